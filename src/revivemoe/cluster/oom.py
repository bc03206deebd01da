"""Whether the kernel's out-of-memory killer has struck: its SIGKILL looks like anybody's.

A host has some of three counters: `memory.events` of the own cgroup (v2), where ranks live too;
`memory.oom_control` (v1); and `/proc/vmstat`, which counts the whole host.
"""

from collections.abc import Sequence
from pathlib import Path

from revivemoe.host.cgroups import MOUNT, OWN, places, read

RECENT_S = 1.0
"""Exits so soon after a strike may be of it: it may end several, and they are told one by one."""
VMSTAT = Path("/proc/vmstat")
NAMES = {1: "memory.oom_control", 2: "memory.events"}
"""Of the counter, by version."""


def count_of(text: str) -> int | None:
    """The count in any of the three files; None without one."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdecimal():
            return int(value)
    return None


def cgroup_counters(cgroups: str, mount: Path) -> list[Path]:
    """Where counters of the cgroups in `/proc/self/cgroup` may be.

    In a container its own cgroup is often the root of the mount, whatever its name.
    """
    found = [
        directory / NAMES[place.version]
        for place in places(cgroups, "memory", mount)
        for directory in (place.own, place.root)
    ]
    return list(dict.fromkeys(found))


def counters() -> list[Path]:
    """Those of this process, whether there or not."""
    return [*cgroup_counters(read(OWN), MOUNT), VMSTAT]


class OomKiller:
    """Watches counters. What cannot be read is no evidence."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._counts = self._now()
        self._struck_at: float | None = None

    def struck(self, now: float) -> bool:
        """Whether it has ended a process since this was last asked, or a moment before that."""
        before, self._counts = self._counts, self._now()
        if any(count > before.get(path, count) for path, count in self._counts.items()):
            self._struck_at = now
        return self._struck_at is not None and now <= self._struck_at + RECENT_S

    def _now(self) -> dict[Path, int]:
        counts = {path: count_of(read(path)) for path in self._paths}
        return {path: count for path, count in counts.items() if count is not None}
