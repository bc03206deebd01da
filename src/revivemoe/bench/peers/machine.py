"""What processes use of this machine, and what somebody else does, from /proc."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

TICKS = os.sysconf("SC_CLK_TCK")
IDLE, WAITING = 3, 4
"""Fields of /proc/stat in which nothing is worked on."""


@dataclass(frozen=True)
class Reading:
    """At one moment. Seconds."""

    at: float
    busy_s: float
    """Of all cores, also what a hypervisor gave to others."""
    own_s: float
    """CPU time of the server and all below it."""
    client_s: float


def read(server_pid: int) -> Reading:
    return Reading(time.monotonic(), _busy_s(), tree_cpu_s(server_pid), time.process_time())


def foreign_cores(before: Reading, after: Reading) -> float:
    """Cores that were busy in between with neither the server nor this process."""
    ours = after.own_s - before.own_s + after.client_s - before.client_s
    return max(after.busy_s - before.busy_s - ours, 0.0) / (after.at - before.at)


def _busy_s() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    counts = [int(field) for field in fields]
    return (sum(counts) - counts[IDLE] - counts[WAITING]) / TICKS


def tree(pid: int) -> Iterable[psutil.Process]:
    """The process and all below it."""
    process = psutil.Process(pid)
    return (process, *process.children(recursive=True))


def tree_cpu_s(pid: int) -> float:
    total = 0.0
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def tree_pss_mb(pid: int) -> float:
    """Memory in MiB, what is shared counted in parts."""
    total = 0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
