"""Topologies whose ranks have roles of their own, and what becomes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revivemoe.ids import Epoch, RankId
from revivemoe.membership.topology import (
    Topology,
    collocated,
    default_microbatches,
    deployment,
    disaggregated,
    donors,
    joined,
    switched,
    without,
)


def ranks(*numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(n) for n in numbers)


def of_roles(epoch: int, attention: tuple[int, ...], experts: tuple[int, ...]) -> Topology:
    members = ranks(*attention, *experts)
    return Topology(Epoch(epoch), members, ranks(*attention), ranks(*experts))


HOME = disaggregated(Epoch(1), 3, 2)


# ---- at the start ---------------------------------------------------------------------------


def test_attention_comes_first_and_experts_after_it() -> None:
    assert disaggregated(Epoch(1), 3, 2) == of_roles(1, (0, 1, 2), (3, 4))
    assert HOME.roles(RankId(2)) == ["attention"]
    assert HOME.roles(RankId(3)) == ["expert"]


def test_logical_ranks_are_places_among_the_members() -> None:
    topology = of_roles(1, (5, 2), (9, 0))
    assert topology.places(ranks(0, 5, 9)) == (3, 0, 2)
    assert topology.places(()) == ()
    with pytest.raises(KeyError, match="7"):
        topology.places(ranks(2, 7))


def test_without_expert_ranks_a_deployment_is_collocated() -> None:
    both = ranks(0, 1)
    assert deployment(Epoch(3), 2, 0) == Topology(Epoch(3), both, both, both)
    assert deployment(Epoch(3), 3, 2) == disaggregated(Epoch(3), 3, 2)


def test_microbatches_are_for_roles_on_ranks_of_their_own() -> None:
    assert default_microbatches(collocated(Epoch(1), 3)) == 1
    assert default_microbatches(HOME) == 2
    assert default_microbatches(Topology(Epoch(1), ranks(0, 1), ranks(0, 1), ranks(1))) == 1


# ---- donors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (HOME, (0, 1, 2)),
        (of_roles(1, (2, 0), (3,)), (2, 0)),
        (of_roles(1, (2, 0), ()), (2, 0)),
        (of_roles(1, (2,), (3,)), ()),
        (of_roles(1, (), (3,)), ()),
        (collocated(Epoch(1), 3), ()),
        (Topology(Epoch(1), ranks(0, 1, 2), ranks(0, 1), ranks(1, 2)), (0,)),
    ],
)
def test_donors_have_no_experts_and_are_not_the_last(
    topology: Topology, expected: tuple[int, ...]
) -> None:
    assert donors(topology) == expected


# ---- switched -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "experts"),
    [(3, (1, 3, 4)), (4, (3, 1, 4)), (None, (3, 4, 1)), (9, (3, 4, 1)), (0, (3, 4, 1))],
    ids=str,
)
def test_the_donor_stands_where_the_replaced_one_does(
    replaced: int | None, experts: tuple[int, ...]
) -> None:
    rank = None if replaced is None else RankId(replaced)
    assert switched(HOME, RankId(1), rank) == of_roles(1, (0, 2), experts)


def test_without_the_replaced_one_the_donor_has_its_logical_rank() -> None:
    after = without(switched(HOME, RankId(0), RankId(3)), frozenset(ranks(3)))
    assert after == of_roles(1, (1, 2), (0, 4))
    assert after.experts.index(RankId(0)) == HOME.experts.index(RankId(3))


def test_switches_add_up() -> None:
    twice = switched(switched(HOME, RankId(2), RankId(4)), RankId(0), RankId(3))
    assert twice == of_roles(1, (1,), (0, 3, 2, 4))


# ---- lost, and back -------------------------------------------------------------------------


def test_a_loss_closes_up_within_each_role() -> None:
    assert without(HOME, frozenset(ranks(0, 3))) == of_roles(1, (1, 2), (4,))
    assert without(HOME, frozenset(ranks(0, 1, 2))) == of_roles(1, (), (3, 4))


@pytest.mark.parametrize("back", [0, 1, 2, 3, 4])
def test_who_comes_back_has_its_old_place_and_role(back: int) -> None:
    left = without(HOME, frozenset(ranks(back)))
    assert joined(left, ranks(back), HOME) == HOME


def test_several_come_back_in_the_order_of_home() -> None:
    left = of_roles(5, (1,), (4,))
    assert joined(left, ranks(3, 2, 0), HOME) == of_roles(5, (0, 1, 2), (3, 4))
    backwards = of_roles(1, (2, 1, 0), (4, 3))
    assert joined(left, ranks(3, 0), backwards) == of_roles(5, (1, 0), (4, 3))


def test_nobody_back_is_no_change() -> None:
    assert joined(HOME, (), HOME) == HOME


def test_a_switched_rank_joins_in_its_new_role() -> None:
    home = switched(HOME, RankId(1), RankId(4))
    left = of_roles(3, (0, 2), (3,))
    assert joined(left, ranks(1), home) == of_roles(3, (0, 2), (3, 1))
    assert joined(left, ranks(4, 1), home) == of_roles(3, (0, 2), (3, 1, 4))


def test_collocated_ranks_come_back_with_both_roles() -> None:
    home = collocated(Epoch(1), 3)
    left = without(home, frozenset(ranks(1)))
    assert joined(left, ranks(1), home) == home


# ---- any history ----------------------------------------------------------------------------


def check(topology: Topology) -> None:
    """What holds for every topology."""
    assert topology.members == (*topology.attention, *topology.experts)
    assert len(set(topology.members)) == len(topology.members)
    assert [topology.logical_rank(r) for r in topology.members] == [*range(len(topology.members))]
    assert topology.places(topology.attention) == tuple(range(len(topology.attention)))
    assert all(len(topology.roles(r)) == 1 for r in topology.members)


@given(st.data())
def test_members_are_compact_with_attention_first_whatever_happens(data: st.DataObject) -> None:
    """Ranks are lost, switch roles and come back; nobody else changes role or order."""
    home = disaggregated(Epoch(1), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)))
    topology = home
    for _ in range(data.draw(st.integers(0, 8))):
        lost = data.draw(st.sets(st.sampled_from(home.members), max_size=2))
        topology = without(topology, frozenset(lost))
        check(topology)
        out = [r for r in home.members if r not in topology.members]
        back = tuple(data.draw(st.permutations(out)))[: data.draw(st.integers(0, len(out)))]
        topology = joined(topology, back, home)
        check(topology)
        assert set(topology.attention) <= set(home.attention)
        if donors(topology) and data.draw(st.booleans()):
            donor = data.draw(st.sampled_from(donors(topology)))
            place = data.draw(st.sampled_from((None, *home.experts)))
            before, home = topology, switched(home, donor, place)
            topology = joined(without(topology, frozenset({donor})), (donor,), home)
            check(topology)
            assert topology.attention == tuple(r for r in before.attention if r != donor)
            assert tuple(r for r in topology.experts if r != donor) == before.experts
            assert topology.attention, "never the last"
