"""A fork server that is started before anybody knows what it is for outlives nobody."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from revivemoe.cluster import launcher
from revivemoe.cluster.launcher import EarlyStart, Launcher

PARENT = """
import sys, time
from revivemoe.cluster.launcher import EarlyStart
early = EarlyStart()
print(early._begun.process.pid, flush=True)
time.sleep(60)
"""


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def runs(pid: int) -> bool:
    """An orphan may wait for ever to be reaped where the first process does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(pid: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not runs(pid)


def protected(pid: int) -> bool:
    """Whether it has come as far as its own code: an interpreter does not ignore SIGINT."""
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def test_it_ends_at_once_with_whoever_started_it() -> None:
    """It loads libraries for seconds, and looks at nothing meanwhile."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until = time.monotonic() + 10
        while not protected(pid):
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        assert gone(pid, 1.0)


def test_it_is_ended_where_it_turns_out_that_nothing_is_to_be_started() -> None:
    before = open_fds()
    with EarlyStart() as early:
        assert early._begun is not None
        pid = early._begun.process.pid
    assert not psutil.pid_exists(pid)
    assert open_fds() == before


def test_a_launcher_takes_it_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    really = launcher.start_process

    def start(arguments: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
        started.append(really(arguments, fds))
        return started[-1]

    monkeypatch.setattr(launcher, "start_process", start)
    with EarlyStart() as early, Launcher(None, kernels=False, early=early) as owner:
        owner.start()
        assert owner.pid == started[0].pid
        owner.restart()
        assert owner.pid == started[1].pid
        assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_one_that_has_died_meanwhile_is_told_as_gone() -> None:
    with EarlyStart() as early, Launcher(None, kernels=False, early=early) as owner:
        assert early._begun is not None
        early._begun.process.kill()
        early._begun.process.wait()
        owner.start()
        assert owner.receive() is None


def test_a_launcher_that_never_starts_leaves_it_alone() -> None:
    before = open_fds()
    with EarlyStart() as early, Launcher(None, early=early):
        pass
    assert open_fds() == before
