"""What a rank says of its own progress, with a clock of the test's own."""

import pytest

from revivemoe.core.progress import Progress
from revivemoe.messages.reports import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pace_of(progress: Progress, phase: str, size: int) -> Pace:
    (pace,) = [p for p in progress.paces() if (p.phase, p.size) == (phase, size)]
    return pace


def call(progress: Progress, clock: Clock, phase: str, rows: int, seconds: float) -> None:
    progress.work(phase, 0, 1, rows)
    clock.now += seconds


def test_it_begins_with_a_long_load(clock: Clock) -> None:
    activity = Progress(clock).activity()
    assert (activity.kind, activity.name) == ("announced", "load")
    assert activity.budget_s is not None
    assert activity.budget_s > 60


def test_waits_are_not_own_work(clock: Clock) -> None:
    progress = Progress(clock)
    progress.work("combine", 2, 7, 4)
    clock.now += 0.01
    progress.waits(True)
    assert progress.activity().kind == "waiting"
    clock.now += 5.0
    assert progress.activity().since_s == pytest.approx(5.0)
    progress.waits(False)
    assert progress.activity().kind == "working"
    clock.now += 0.02
    assert progress.own_s == pytest.approx(0.03)
    progress.work("experts", 2, 7, 4)
    assert pace_of(progress, "combine", 3).seconds == pytest.approx(0.03)


def test_what_rows_predict(clock: Clock) -> None:
    progress = Progress(clock)
    progress.work("experts", 0, 0, 4)
    assert progress.activity().budget_s is None, "no experience"
    clock.now += 0.1
    call(progress, clock, "experts", 4, 0.1)
    progress.work("experts", 0, 2, 5)
    assert progress.activity().budget_s == pytest.approx(0.1), "the same class of rows"
    progress.work("experts", 0, 2, 64)
    budget_s = progress.activity().budget_s
    assert budget_s is not None
    assert budget_s >= 0.1 * 8, "more rows take longer"


def test_every_phase_and_wait_is_progress(clock: Clock) -> None:
    progress = Progress(clock)
    counts = [progress.count]
    for act in (
        lambda: progress.work("attention", 0, 1, 4),
        lambda: progress.waits(True),
        lambda: progress.waits(False),
        progress.idle,
        lambda: progress.announce("load", 20.0),
    ):
        act()
        counts.append(progress.count)
    assert counts == sorted(set(counts))


def test_an_average_moves_towards_what_is_new(clock: Clock) -> None:
    progress = Progress(clock)
    for seconds in (0.1, 0.1, 1.1):
        call(progress, clock, "experts", 4, seconds)
    progress.idle()
    pace = pace_of(progress, "experts", 3)
    assert pace.count == 3
    assert 0.1 < pace.seconds < 0.3
