from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from revivemoe.ids import ExpertId, LayerId, RankId
from revivemoe.membership.placement import EMPTY, ExpertPlacement, place


def ranks(count: int) -> list[RankId]:
    return [RankId(r) for r in range(count)]


def rows(placement: ExpertPlacement) -> list[tuple[int, ...]]:
    """Slots of the first layer, rank by rank."""
    return [placement.slots[rank][0] for rank in sorted(placement.slots)]


def held_by(row: tuple[int, ...]) -> list[int]:
    return [e for e in row if e != EMPTY]


@pytest.mark.parametrize(
    ("experts", "num_ranks", "redundant", "spare", "expected"),
    [
        (4, 1, 0, 0, [(0, 1, 2, 3)]),
        (4, 2, 0, 0, [(0, 1), (2, 3)]),
        (5, 2, 0, 0, [(0, 1, EMPTY), (2, 3, 4)]),
        (4, 2, 0, 1, [(0, 1, EMPTY), (2, 3, EMPTY)]),
        (4, 2, 4, 0, [(0, 1, 2, 3), (2, 3, 0, 1)]),
        (4, 4, 4, 0, [(0, 1), (1, 0), (2, 3), (3, 2)]),
        (2, 2, 1, 0, [(0, EMPTY), (1, 0)]),
    ],
)
def test_small_placements(
    experts: int, num_ranks: int, redundant: int, spare: int, expected: list[tuple[int, ...]]
) -> None:
    placement = place(experts, [3], ranks(num_ranks), redundant, spare)
    assert [set(row) for row in rows(placement)] == [set(row) for row in expected]
    assert {len(row) for row in rows(placement)} == {len(expected[0])}
    assert placement.layers == (LayerId(3),)


def test_all_layers_are_placed_alike() -> None:
    placement = place(4, [1, 2, 5], ranks(2), 2)
    for table in placement.slots.values():
        assert len(table) == 3
        assert len(set(table)) == 1


def test_ranks_of_any_id() -> None:
    assert sorted(place(4, [0], [RankId(7), RankId(3)]).slots) == [3, 7]


def owned(experts: int, num_ranks: int) -> list[list[int]]:
    """What each rank holds without any replica: that stays where it is."""
    return [held_by(row) for row in rows(place(experts, [0], ranks(num_ranks)))]


SIZES = st.integers(1, 6).flatmap(
    lambda num_ranks: st.integers(num_ranks, 24).flatmap(
        lambda experts: st.tuples(
            st.just(experts),
            st.just(num_ranks),
            st.integers(0, experts * (num_ranks - 1)),
            st.integers(0, 3),
        )
    )
)


@given(SIZES)
def test_every_placement_is_sound(sizes: tuple[int, int, int, int]) -> None:
    experts, num_ranks, redundant, spare = sizes
    placement = place(experts, [0], ranks(num_ranks), redundant, spare)
    held = [held_by(row) for row in rows(placement)]
    assert all(len(set(on_rank)) == len(on_rank) for on_rank in held), "two replicas on a rank"
    replicas = Counter(e for on_rank in held for e in on_rank)
    assert sorted(replicas) == list(range(experts)), "an expert is not placed"
    assert sum(replicas.values()) == experts + redundant, "the budget is not used"
    assert max(replicas.values()) - min(replicas.values()) <= 1, "some expert is favoured"
    assert not any(
        len(full) - len(empty) > 1 and set(full) - set(empty) - set(own)
        for full, own in zip(held, owned(experts, num_ranks), strict=True)
        for empty in held
    ), "moving a replica would level"
    if redundant % experts == 0 and experts % num_ranks == 0:
        assert len({len(on_rank) for on_rank in held}) == 1
    assert min(row.count(EMPTY) for row in rows(placement)) == spare
    assert placement.missing == ()


@given(SIZES)
@example((14, 4, 6, 0))
@example((5, 2, 2, 0))
def test_the_budget_covers_as_many_ranks_as_it_can(sizes: tuple[int, int, int, int]) -> None:
    """Covering a rank costs a replica of each of its experts, so cheap ranks are covered first."""
    experts, num_ranks, redundant, _ = sizes
    placement = place(experts, [0], ranks(num_ranks), redundant)
    unhurt = [rank for rank in ranks(num_ranks) if not placement.without(frozenset({rank})).missing]
    prices = sorted(len(own) for own in owned(experts, num_ranks))
    affordable = sum(total <= redundant for total in accumulate(prices))
    assert len(unhurt) == (affordable if num_ranks > 1 else 0)


@pytest.mark.parametrize(
    ("redundant", "unhurt"), [(0, 0), (3, 0), (4, 1), (8, 2), (12, 3), (16, 4)]
)
def test_each_rank_covered_costs_its_experts(redundant: int, unhurt: int) -> None:
    placement = place(16, [0, 1], ranks(4), redundant)
    lost = [placement.without(frozenset({r})).missing for r in ranks(4)]
    assert sum(not missing for missing in lost) == unhurt


def test_two_replicas_each_survive_any_two_losses() -> None:
    placement = place(8, [0], ranks(4), 16)
    for a in ranks(4):
        for b in ranks(4):
            assert placement.without(frozenset({a, b})).missing == ()


@pytest.mark.parametrize(
    ("experts", "num_ranks", "redundant", "says"),
    [
        (4, 5, 0, "5 expert-holding ranks but only 4 experts per layer"),
        (4, 2, 5, r"--redundant-experts 5 is more than 4 experts on 2 ranks can use \(4\)"),
        (4, 1, 1, r"--redundant-experts 1 is more than 4 experts on 1 ranks can use \(0\)"),
    ],
)
def test_what_cannot_be_placed(experts: int, num_ranks: int, redundant: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        place(experts, [0], ranks(num_ranks), redundant)


# ---- the value ------------------------------------------------------------------------------

LITERAL = ExpertPlacement(
    num_experts=4,
    layers=(LayerId(1), LayerId(2)),
    slots={
        RankId(0): ((0, 1, EMPTY), (0, 1, 2)),
        RankId(1): ((2, 3, 0), (2, 3, 0)),
    },
)


def test_holders() -> None:
    assert LITERAL.holders(LayerId(1), ExpertId(0)) == [(0, 0), (1, 2)]
    assert LITERAL.holders(LayerId(2), ExpertId(3)) == [(1, 1)]
    assert LITERAL.slots_per_rank == 3


def test_sole_holders_are_what_a_death_would_cost() -> None:
    assert LITERAL.sole_holders == {
        0: {(1, 1), (2, 1)},
        1: {(1, 2), (1, 3), (2, 3)},
    }
    for rank, sole in LITERAL.sole_holders.items():
        assert set(LITERAL.without(frozenset({rank})).missing) == sole


def test_missing_is_sorted_and_counted_by_layer() -> None:
    left = LITERAL.without(frozenset({RankId(1)}))
    assert left.missing == ((1, 2), (1, 3), (2, 3))
    assert left.missing_fraction == 2 / 4
    assert LITERAL.missing_fraction == 0
    assert left.without(frozenset({RankId(0)})).missing_fraction == 1
