"""Groups that share the dense layers, through any history of losses and returns."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revivemoe.ids import RankId
from revivemoe.membership.dense_groups import DenseGroups, form_groups


def ranks(*numbers: int) -> tuple[RankId, ...]:
    return tuple(RankId(n) for n in numbers)


def gone(*numbers: int) -> frozenset[RankId]:
    return frozenset(ranks(*numbers))


PAIRS = form_groups(ranks(0, 1, 2, 3), 2)


def after(
    groups: DenseGroups, attention: tuple[RankId, ...], lost: frozenset[RankId]
) -> DenseGroups:
    """The groups of the next epoch: `lost` went out, and `attention` are there now."""
    return groups.without(lost).completed(attention)


# ---- at the start ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "size", "groups"),
    [
        ((0, 1, 2, 3), 2, ((0, 1), (2, 3))),
        ((0, 1, 2, 3, 4), 2, ((0, 1), (2, 3))),
        ((0, 1, 2, 3, 4, 5), 3, ((0, 1, 2), (3, 4, 5))),
        ((4, 7, 5), 3, ((4, 7, 5),)),
        ((0, 1), 1, ((0,), (1,))),
    ],
    ids=str,
)
def test_as_many_groups_as_there_are_ranks_for(
    attention: tuple[int, ...], size: int, groups: tuple[tuple[int, ...], ...]
) -> None:
    formed = form_groups(ranks(*attention), size)
    assert (formed.size, formed.home, formed.extra) == (size, groups, ())
    assert formed.healthy(ranks(*attention)) == groups


def test_too_few_ranks_for_one_group() -> None:
    with pytest.raises(ValueError, match=r"--dense-ffn-tp 4 is more than the 3 attention ranks"):
        form_groups(ranks(0, 1, 2), 4)


# ---- losses and returns ---------------------------------------------------------------------


def test_a_group_that_has_lost_a_shard_is_out_as_a_whole() -> None:
    formed = after(PAIRS, ranks(0, 2, 3), gone(1))
    assert formed == PAIRS, "the other group is healthy: no new one"
    assert formed.healthy(ranks(0, 2, 3)) == ((2, 3),)
    assert formed.shards_of(RankId(0), ranks(0, 2, 3)) == set(), "its shard is of no use alone"
    assert formed.shards_of(RankId(3), ranks(0, 2, 3)) == {1}


def test_when_no_group_is_healthy_the_survivors_form_one() -> None:
    left = ranks(0, 3)
    formed = after(after(PAIRS, ranks(0, 2, 3), gone(1)), left, gone(2))
    assert (formed.home, formed.extra) == (PAIRS.home, ((0, 3),))
    assert formed.healthy(left) == ((0, 3),)
    assert [formed.shards_of(RankId(r), left) for r in (0, 3)] == [{0}, {1}]


@pytest.mark.parametrize(
    ("attention", "group"),
    [((5,), (5, 5, 5, 5)), ((5, 2), (5, 2, 5, 2)), ((5, 2, 1), (5, 2, 1, 5))],
    ids=str,
)
def test_too_few_survivors_hold_several_shards_each(
    attention: tuple[int, ...], group: tuple[int, ...]
) -> None:
    before = DenseGroups(4, (ranks(0, 1, 2, 5),))
    formed = after(before, ranks(*attention), gone(0))
    assert formed.extra == (group,)
    shards = [formed.shards_of(RankId(r), ranks(*attention)) for r in attention]
    assert frozenset().union(*shards) == {0, 1, 2, 3}
    assert sum(map(len, shards)) == 4, "each by one of them"


def test_who_comes_back_has_its_old_shard_and_its_old_group() -> None:
    broken = after(PAIRS, ranks(0, 3), gone(1, 2))
    back = after(broken, ranks(0, 1, 3), gone())
    assert back.healthy(ranks(0, 1, 3)) == ((0, 1), (0, 3)), "the old one, and that of meanwhile"
    assert back.shards_of(RankId(0), ranks(0, 1, 3)) == {0}


def test_a_rank_in_two_healthy_groups_holds_the_shards_of_both() -> None:
    two = DenseGroups(2, (ranks(0, 1),), extra=(ranks(2, 0), ranks(3, 3)))
    assert two.shards_of(RankId(0), ranks(0, 1, 2)) == {0, 1}
    assert two.shards_of(RankId(0), ranks(0, 2)) == {1}, "the first one is broken"
    assert two.shards_of(RankId(3), ranks(0, 1, 2, 3)) == {0, 1}
    assert two.shards_of(RankId(9), ranks(0, 1, 2, 3)) == set()


def test_a_new_process_has_no_part_in_an_extra_group() -> None:
    """Rank 3 was lost and is back before the next epoch: it has only what it starts with."""
    broken = after(PAIRS, ranks(0, 3), gone(1, 2))
    assert broken.extra == ((0, 3),)
    again = after(broken, ranks(0, 1, 3), gone(3))
    assert again.extra == ()
    assert again.healthy(ranks(0, 1, 3)) == ((0, 1),)


def test_a_group_of_meanwhile_is_not_formed_twice() -> None:
    broken = after(PAIRS, ranks(0, 3), gone(1, 2))
    assert after(broken, ranks(0, 3), gone()) == broken


def test_without_attention_ranks_there_is_no_group() -> None:
    formed = after(PAIRS, (), gone(0, 1, 2, 3))
    assert (formed.extra, formed.healthy(())) == ((), ())


# ---- any history ----------------------------------------------------------------------------


class History:
    """The attention ranks and groups of an instance; each event is one epoch."""

    def __init__(self, num_ranks: int, size: int) -> None:
        self.home = ranks(*range(num_ranks))
        self.attention = self.home
        self.groups = form_groups(self.home, size)

    def epoch(self, lost: set[int], back: set[int]) -> None:
        """`lost` go out and `back` come in. Whoever does both has been replaced in between."""
        left = [r for r in self.attention if r not in lost]
        self.attention = tuple(r for r in self.home if r in left or r in back)
        self.groups = after(self.groups, self.attention, gone(*lost))


EVENTS = st.lists(
    st.tuples(st.sets(st.integers(0, 6), max_size=4), st.sets(st.integers(0, 6), max_size=3)),
    max_size=12,
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[History, list[tuple[set[int], set[int]]]]:
    num_ranks = draw(st.integers(1, 7))
    return History(num_ranks, draw(st.integers(1, num_ranks))), draw(EVENTS)


@given(histories())
def test_after_any_history_a_healthy_group_is_left(
    drawn: tuple[History, list[tuple[set[int], set[int]]]],
) -> None:
    history, events = drawn
    for lost, back in events:
        history.epoch(lost, back)
        attention, groups = history.attention, history.groups
        healthy = groups.healthy(attention)
        assert bool(healthy) == bool(attention)
        assert all(set(group) <= set(attention) for group in healthy)
        assert all(len(group) == groups.size for group in healthy)
        assert groups.home == form_groups(history.home, groups.size).home
        assert len(set(groups.extra)) == len(groups.extra)


@given(histories())
def test_after_any_history_every_shard_of_a_healthy_group_is_held(
    drawn: tuple[History, list[tuple[set[int], set[int]]]],
) -> None:
    history, events = drawn
    for lost, back in events:
        history.epoch(lost, back)
        attention, groups = history.attention, history.groups
        expected = {r: groups.shards_of(r, attention) for r in history.home}
        named = {r: set[int]() for r in history.home}
        for group in groups.healthy(attention):
            assert [s for s, r in enumerate(group) if s in expected[r]] == [*range(groups.size)]
            for shard, rank in enumerate(group):
                named[rank].add(shard)
        assert expected == named, "and nothing that no healthy group needs"


@given(histories())
def test_new_groups_spread_the_shards_evenly(
    drawn: tuple[History, list[tuple[set[int], set[int]]]],
) -> None:
    history, events = drawn
    known = set(history.groups.extra)
    for lost, back in events:
        history.epoch(lost, back)
        for group in set(history.groups.extra) - known:
            counts = Counter(group)
            assert set(counts) <= set(history.attention)
            assert len(counts) == min(history.groups.size, len(history.attention))
            assert max(counts.values()) - min(counts.values()) <= 1
        known = set(history.groups.extra)


@given(histories())
def test_a_process_that_was_lost_has_no_part_in_a_group_from_before(
    drawn: tuple[History, list[tuple[set[int], set[int]]]],
) -> None:
    history, events = drawn
    for lost, back in events:
        history.epoch(lost, back)
        groups, attention = history.groups, history.attention
        for group in groups.extra:
            formed_now = groups.healthy(attention) == (group,)
            assert formed_now or not set(group) & lost
