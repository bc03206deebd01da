import pytest

from revivemoe.ids import Epoch, RankId
from revivemoe.membership.topology import Topology, collocated, without


def ranks(*numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(n) for n in numbers)


def test_collocated_ranks_have_both_roles() -> None:
    topology = collocated(Epoch(1), 3)
    assert topology.members == topology.attention == topology.experts == ranks(0, 1, 2)
    assert [topology.logical_rank(r) for r in topology.members] == [0, 1, 2]
    assert topology.roles(RankId(1)) == ["attention", "expert"]


def test_survivors_close_up_and_keep_their_order_and_ids() -> None:
    after = without(collocated(Epoch(5), 4), frozenset(ranks(1)))
    assert after.epoch == 5, "whose epoch it is, is not its affair"
    assert after.members == ranks(0, 2, 3)
    assert [after.logical_rank(r) for r in ranks(0, 2, 3)] == [0, 1, 2]


def test_a_stranger_has_no_logical_rank_and_no_role() -> None:
    after = without(collocated(Epoch(1), 2), frozenset(ranks(0)))
    with pytest.raises(KeyError, match="0"):
        after.logical_rank(RankId(0))
    assert after.roles(RankId(0)) == []


def test_losing_nobody_changes_nothing() -> None:
    before = collocated(Epoch(1), 3)
    assert without(before, frozenset()) == before


def test_disaggregated_roles_stay_apart() -> None:
    topology = Topology(Epoch(1), ranks(0, 1, 2, 3), ranks(0, 1), ranks(2, 3))
    after = without(topology, frozenset(ranks(1, 2)))
    assert (after.members, after.attention, after.experts) == (ranks(0, 3), ranks(0), ranks(3))
    assert after.roles(RankId(0)) == ["attention"]
    assert after.roles(RankId(3)) == ["expert"]
