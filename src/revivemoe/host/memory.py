"""Memory that may be taken: the least of what the host has and what the control groups leave.

A group leaves its limit, less what is charged to it, but for the page cache that is not mapped: the
kernel takes that back before it kills anybody (so does it count `MemAvailable` of a host).
"""

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from revivemoe.host.cgroups import Place, number, own_places, read


class Files(NamedTuple):
    """Names in a group's directory, and in its memory.stat."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]
    mapped: str


FILES = {
    1: Files(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
        "total_mapped_file",
    ),
    2: Files(
        ("memory.max", "memory.high"),
        "memory.current",
        ("inactive_file", "active_file"),
        "file_mapped",
    ),
}
"""By version. Above `memory.high` a group is slowed down until it stands still: a limit as well."""


class Limit(NamedTuple):
    """Of one group, bytes."""

    path: Path
    """The file that says so."""
    total: int
    free: int


def free_bytes() -> int:
    """What can be had now."""
    available = int(psutil.virtual_memory().available)
    return min([available, *(limit.free for limit in own_limits())])


def taken_bytes() -> int:
    """What this process has taken, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def capacity() -> Limit:
    """All that could ever be had: the lowest limit, or the host's memory."""
    host = psutil.virtual_memory()
    whole = Limit(Path("/proc/meminfo"), int(host.total), int(host.available))
    return min([whole, *own_limits()], key=lambda limit: limit.total)


def own_limits() -> list[Limit]:
    return limits(own_places("memory"))


def limits(places: Iterable[Place]) -> list[Limit]:
    """All limits along the paths."""
    found = (_limit(group, FILES[place.version]) for place in places for group in place.along())
    return [limit for limit in found if limit is not None]


def _limit(group: Path, files: Files) -> Limit | None:
    said = ((number(read(group / name)), group / name) for name in files.limits)
    total, path = min(((n, p) for n, p in said if n is not None), default=(None, group))
    usage = number(read(group / files.usage))
    if total is None or usage is None:
        return None
    held = usage - reclaimable(read(group / "memory.stat"), files)
    return Limit(path, total, max(0, total - held))


def reclaimable(stat: str, files: Files) -> int:
    """Page cache that nobody has mapped, from a memory.stat."""
    counts = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    cache = sum(number(counts.get(name, "")) or 0 for name in files.cache)
    return max(0, cache - (number(counts.get(files.mapped, "")) or 0))
