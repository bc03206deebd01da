"""How many threads compute while somebody else has the processor, too."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from revivemoe.executor.threads import LOOK_EVERY_S, TRY_AGAIN_AT_MOST_S, Threads, queued_s


class Machine:
    """As many cores as threads, of which somebody else wants half from time to time."""

    def __init__(self, threads: int = 2) -> None:
        self.now = self.queued = self.noise_s = 0.0
        self.busy = False
        self.used: list[tuple[float, int]] = []
        self.threads = Threads(threads, lambda: self.now, lambda: {"a": self.queued}, self._use)

    def _use(self, count: int) -> None:
        self.used.append((self.now, count))

    def run(self, seconds: float) -> None:
        """Steps of 30 ms."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.03
            self.queued += 0.03 * self.noise_s * self.threads.count
            if self.busy and self.threads.count > 1:
                self.queued += 0.015 * max(1, self.threads.count // 2)
            self.threads.look()


def test_alone_nothing_changes() -> None:
    machine = Machine()
    machine.run(60)
    assert machine.used == []


def test_one_less_while_somebody_else_is_there() -> None:
    machine = Machine()
    machine.run(1)
    machine.busy = True
    machine.run(2 * LOOK_EVERY_S + 0.1)
    assert [count for _, count in machine.used] == [1]
    machine.busy = False
    machine.run(3)
    assert machine.threads.count == 2


def test_trials_are_short_and_rarer_each_time() -> None:
    machine = Machine()
    machine.busy = True
    machine.run(300)
    tries = [at for at, count in machine.used if count == 2]
    ends = [at for at, count in machine.used if count == 1][1:]
    assert all(end - begin <= 2 * LOOK_EVERY_S for begin, end in zip(tries, ends, strict=False))
    apart = [round(b - a, 3) for a, b in pairwise(tries)]
    assert apart == sorted(apart)
    assert TRY_AGAIN_AT_MOST_S <= apart[-1] < TRY_AGAIN_AT_MOST_S + 1


def test_after_a_quiet_time_trials_are_frequent_again() -> None:
    machine = Machine()
    machine.busy = True
    machine.run(100)
    machine.busy = False
    machine.run(120)
    assert machine.threads.count == 2
    machine.busy = True
    machine.run(2 * LOOK_EVERY_S + 0.1)
    at, count = machine.used[-1]
    assert count == 1
    machine.busy = False
    machine.run(2)
    assert machine.used[-1] == (pytest.approx(at + 1, abs=0.2), 2)


def test_a_short_crowd_is_not_paid_for_by_many_threads_for_long() -> None:
    machine = Machine(16)
    machine.run(1)
    machine.busy = True
    machine.run(1)
    assert machine.threads.count < 10
    machine.busy = False
    machine.run(2)
    assert machine.threads.count == 16


def test_many_threads_that_each_wait_a_little_stay() -> None:
    machine = Machine(64)
    machine.noise_s = 0.003
    machine.run(60)
    assert machine.used == []


def test_one_thread_never_looks() -> None:
    def asked() -> Iterator[dict[str, float]]:
        raise AssertionError("a single thread shares nothing")
        yield

    Threads(1, queued=lambda: next(asked())).look()


def test_threads_that_come_go_or_cannot_be_asked_are_no_crowd() -> None:
    """What a thread has waited in all its life says nothing about now."""
    told = iter([{"a": 0.0, "b": 500.0}, {"a": 0.0}, {}, {"a": 0.0, "b": 500.0, "c": 70.0}, {}])
    now, used = iter(float(n) for n in range(5)), list[int]()
    threads = Threads(4, lambda: next(now), lambda: next(told), used.append)
    for _ in range(4):
        threads.look()
    assert used == []


def test_without_a_descriptor_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Iterator[Path]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Path, "iterdir", refused)
    assert queued_s() == {}


def test_the_kernel_tells_who_waits() -> None:
    """More busy threads than processors: some of them stand in the queue."""
    busy = ["-c", "import time; end = time.time() + 0.6\nwhile time.time() < end: pass"]
    others = [subprocess.Popen([sys.executable, *busy]) for _ in range(2 * (os.cpu_count() or 1))]
    before, end = sum(queued_s().values()), time.monotonic() + 0.4
    while time.monotonic() < end:
        pass
    after = sum(queued_s().values())
    for other in others:
        other.wait()
    assert after - before > 0.02
