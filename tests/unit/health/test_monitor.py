"""The threads: delivery, trouble, and an end that comes in time."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from revivemoe.health.monitor import HealthMonitor
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport

TICK_S = 0.005
PATIENCE_S = 10.0


def report(level: int) -> DeviceReport:
    return DeviceReport(RankId(0), level, "code", "detail", "test")


class Script:
    """A source that answers, call for call, what it was given; afterwards nothing."""

    def __init__(self, *answers: DeviceReport | Exception, name: str = "script") -> None:
        self.name = name
        self.answers = list(answers)
        self.polled_at: list[float] = []
        self.closed_in = ""
        self.close_error: Exception | None = None

    def poll(self) -> list[DeviceReport]:
        self.polled_at.append(time.monotonic())
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return [] if answer is None else [answer]

    def close(self) -> None:
        assert not self.closed_in
        self.closed_in = threading.current_thread().name
        if self.close_error is not None:
            raise self.close_error


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(TICK_S)


def test_reports_of_all_sources_arrive_in_order() -> None:
    one, two = Script(report(1), report(2), name="one"), Script(report(3), name="two")
    seen: list[int] = []
    with HealthMonitor([one, two], lambda r: seen.append(r.level), interval_s=TICK_S):
        until(lambda: len(seen) == 3)
    assert [level for level in seen if level < 3] == [1, 2]
    assert (one.closed_in, two.closed_in) == ("health-one", "health-two")


def test_trouble_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "revivemoe.health")
    troubles = [ConnectionError("first\nline"), OSError("second"), ValueError("third")]
    source = Script(*troubles, report(4))
    seen: list[int] = []
    with HealthMonitor([source], lambda r: seen.append(r.level), interval_s=TICK_S):
        until(lambda: seen == [4])
        until(lambda: len(caplog.messages) == 2)
    assert caplog.messages == [
        "script: ConnectionError: first line; trying again",
        "script: answers again after 3 failures",
    ]


def test_a_failing_source_is_asked_less_and_less_often_and_others_are_not() -> None:
    bad, good = Script(*[OSError("no")] * 1000, name="bad"), Script(name="good")
    monitor = HealthMonitor([bad, good], print, interval_s=TICK_S, max_backoff_s=8 * TICK_S)
    with monitor:
        until(lambda: len(bad.polled_at) >= 6)
    gaps = [b - a for a, b in zip(bad.polled_at, bad.polled_at[1:], strict=False)]
    for gap, least in zip(gaps, (2, 4, 8, 8), strict=False):
        assert gap >= least * TICK_S * 0.9
    assert len(good.polled_at) > len(bad.polled_at)


def test_the_pause_is_bounded() -> None:
    monitor = HealthMonitor([], print, interval_s=1.0)
    assert [monitor._pause_s(n) for n in (0, 1, 2, 5, 6, 10_000)] == [1, 2, 4, 32, 60, 60]


def test_a_report_that_was_refused_is_offered_again() -> None:
    source = Script(report(1), report(2))
    seen: list[int] = []
    refusals = [RuntimeError("loop is closed"), RuntimeError("loop is closed")]

    def on_report(found: DeviceReport) -> None:
        if refusals:
            raise refusals.pop()
        seen.append(found.level)

    with HealthMonitor([source], on_report, interval_s=TICK_S):
        until(lambda: len(seen) == 2)
    assert seen == [1, 2]


def test_a_source_stuck_in_its_driver_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    release, entered = threading.Event(), threading.Event()

    class Stuck(Script):
        def poll(self) -> list[DeviceReport]:
            entered.set()
            assert release.wait(PATIENCE_S)
            return []

    stuck, fine = Stuck(name="stuck"), Script(name="fine")
    with HealthMonitor([stuck, fine], print, interval_s=TICK_S, stop_timeout_s=0.2):
        assert entered.wait(PATIENCE_S)
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    assert any("health-stuck did not end" in line for line in caplog.messages)
    assert fine.closed_in
    assert not stuck.closed_in
    release.set()
    until(lambda: bool(stuck.closed_in))


def test_the_end_does_not_wait_for_the_next_poll() -> None:
    source = Script()
    source.close_error = OSError("closing fails")
    began = time.monotonic()
    with HealthMonitor([source], print, interval_s=60.0) as monitor:
        pass
    monitor.stop()
    assert time.monotonic() - began < 2.0
    assert source.closed_in
    assert not [t for t in threading.enumerate() if t.name == "health-script"]


def test_an_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="interval_s 0"):
        HealthMonitor([], print, interval_s=0)
