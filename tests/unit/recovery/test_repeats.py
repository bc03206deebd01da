"""What is redone once and laid to a rank the second time."""

import pytest

from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.reports import NonFinite, Pace
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repeats import Links, Numbers
from revivemoe.recovery.slowness import MIN_CALLS, Slowness


def pair(*ranks: int) -> frozenset[RankId]:
    return frozenset(RankId(r) for r in ranks)


def test_a_link_that_fails_once_is_tried_again() -> None:
    assert Links(60).failed(pair(1, 3), 10.0) is None


def test_twice_in_a_row_between_the_same_two_isolates_one_of_them() -> None:
    links = Links(60)
    links.failed(pair(1, 3), 10.0)
    fault = links.failed(pair(3, 1), 20.0)
    assert fault is not None
    assert (fault.rank, fault.kind) == (3, "communication")


@pytest.mark.parametrize(
    ("second", "at"),
    [(pair(1, 2), 20.0), (pair(1, 3), 71.0), (pair(1), 20.0), (pair(0, 1, 3), 20.0)],
)
def test_others_or_much_later_is_not_twice_in_a_row(second: frozenset[RankId], at: float) -> None:
    links = Links(60)
    links.failed(pair(1, 3), 10.0)
    assert links.failed(second, at) is None


def test_another_failure_in_between_breaks_the_row() -> None:
    links = Links(60)
    links.failed(pair(1, 3), 10.0)
    links.failed(pair(0, 2), 11.0)
    assert links.failed(pair(1, 3), 12.0) is None


# ---- numbers --------------------------------------------------------------------------------


def claim(rank: int, layer: int, phase: str, here: bool, epoch: int = 4) -> NonFinite:
    return NonFinite(RankId(rank), Incarnation(1), Epoch(epoch), 9, layer, phase, here)


def told(numbers: Numbers, *claims: NonFinite) -> None:
    for one in claims:
        numbers.claim(one)


def test_the_first_producer_is_blamed_not_who_saw_it_first() -> None:
    numbers = Numbers(60)
    for now in (1.0, 2.0):
        told(
            numbers,
            claim(0, 2, "combine", False),
            claim(3, 2, "experts", True),
            claim(1, 5, "attention", True),
            claim(2, -1, "sample", True),
        )
        fault = numbers.settle(now)
    assert fault is not None
    assert (fault.rank, fault.kind) == (3, "non_finite")
    assert "experts, layer 2" in fault.detail


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ((1, "attention"), (1, "experts")),
        ((1, "experts"), (2, "attention")),
        ((7, "experts"), (-1, "sample")),
    ],
)
def test_the_order_of_places(earlier: tuple[int, str], later: tuple[int, str]) -> None:
    numbers = Numbers(60)
    for _ in range(2):
        told(numbers, claim(0, *later, True), claim(1, *earlier, True))
        fault = numbers.settle(1.0)
    assert fault is not None
    assert fault.rank == 1


def test_once_is_redone() -> None:
    numbers = Numbers(60)
    told(numbers, claim(3, 2, "experts", True))
    assert numbers.settle(1.0) is None
    assert numbers.settle(2.0) is None, "no claim, no blame"


def test_much_later_is_once_again() -> None:
    numbers = Numbers(60)
    for now in (1.0, 62.0):
        told(numbers, claim(3, 2, "experts", True))
        assert numbers.settle(now) is None


def test_victims_alone_blame_nobody() -> None:
    numbers = Numbers(60)
    for _ in range(3):
        told(numbers, claim(0, 2, "combine", False))
        assert numbers.settle(1.0) is None


def test_claims_of_an_older_epoch_do_not_count() -> None:
    numbers = Numbers(60)
    told(numbers, claim(3, 2, "experts", True, epoch=4))
    numbers.settle(1.0)
    told(numbers, claim(0, 9, "experts", True, epoch=6), claim(3, 2, "experts", True, epoch=4))
    assert numbers.settle(2.0) is None, "rank 0 for the first time"


def test_a_new_process_has_a_clean_slate() -> None:
    numbers = Numbers(60)
    told(numbers, claim(3, 2, "experts", True))
    numbers.settle(1.0)
    numbers.forget(RankId(3))
    told(numbers, claim(3, 2, "experts", True, epoch=5))
    assert numbers.settle(2.0) is None


# ---- slowness -------------------------------------------------------------------------------


def pace(seconds: float, phase: str = "experts", size: int = 3, count: int = MIN_CALLS) -> Pace:
    return Pace(phase, size, seconds, count)


def slowness(factor: float = 3.0) -> Slowness:
    return Slowness(Policy(slow_factor=factor, slow_after_s=2.0))


def test_slow_against_its_peers_for_long_enough() -> None:
    slow = slowness()
    for rank, seconds in enumerate((0.01, 0.012, 0.011, 0.05)):
        slow.heard(RankId(rank), [pace(seconds)])
    assert slow.judge(10.0) == {}
    assert slow.judge(11.0) == {}
    assert slow.judge(11.9) == {}
    assert list(slow.judge(12.0)) == [3]
    slow.heard(RankId(3), [pace(0.012)])
    assert list(slow.judge(12.9)) == [3], "looked at once a second"
    assert slow.judge(13.0) == {}


def test_only_like_is_compared_with_like() -> None:
    """Rank 1 had bigger batches: other classes of rows."""
    slow = slowness()
    slow.heard(RankId(0), [pace(0.01, size=1)])
    slow.heard(RankId(1), [pace(0.5, size=9)])
    slow.judge(10.0)
    assert slow.judge(20.0) == {}


def test_few_calls_say_nothing() -> None:
    slow = slowness()
    slow.heard(RankId(0), [pace(0.01)])
    slow.heard(RankId(1), [pace(0.5, count=MIN_CALLS - 1)])
    slow.judge(10.0)
    assert slow.judge(20.0) == {}


def test_without_peers_its_own_best_counts() -> None:
    slow = slowness()
    slow.heard(RankId(0), [pace(0.01)])
    assert slow.ratios() == {RankId(0): 1.0}
    slow.heard(RankId(0), [pace(0.05)])
    slow.judge(10.0)
    assert list(slow.judge(20.0)) == [0]


def test_a_rank_that_is_out_is_no_peer() -> None:
    slow = slowness()
    slow.heard(RankId(0), [pace(0.01)])
    slow.heard(RankId(1), [pace(0.05)])
    slow.judge(10.0)
    slow.forget(RankId(0))
    assert slow.judge(20.0) == {}


def test_work_that_a_rank_does_no_more_does_not_speak_for_it() -> None:
    """Averages of the start outvoted what it did now: eight times slower, and nothing was said."""
    slowness = Slowness(Policy(slow_after_s=3.0))
    old = [Pace("experts", n, 0.001, MIN_CALLS) for n in range(6)]
    found: dict[RankId, float] = {}
    for second in range(20):
        for rank in range(4):
            now_s = 0.008 if rank == 2 and second > 5 else 0.001
            present = Pace("attention", 1, now_s, MIN_CALLS + 10 * second)
            slowness.heard(RankId(rank), [*old, present])
        found = slowness.judge(float(second))
    assert found == {2: pytest.approx(8.0)}
