"""Whether the kernel's out-of-memory killer has struck: its SIGKILL looks like anybody's.

A host has some of three counters: `memory.events` of the own cgroup (v2), where ranks live too;
`memory.oom_control` (v1); and `/proc/vmstat`, which counts the whole host.
"""

from collections.abc import Sequence
from pathlib import Path

RECENT_S = 1.0
"""Exits so soon after a strike may be of it: it may end several, and they are told one by one."""
MOUNT = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")
OWN_CGROUPS = Path("/proc/self/cgroup")


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
    found: list[Path] = []
    for line in cgroups.splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            roots, name = [mount, mount / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            roots, name = [mount / "memory"], "memory.oom_control"
        else:
            continue
        found += [directory / name for root in roots for directory in (root / own[1:], root)]
    return list(dict.fromkeys(found))


def counters() -> list[Path]:
    """Those of this process, whether there or not."""
    return [*cgroup_counters(_read(OWN_CGROUPS), MOUNT), VMSTAT]


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
        counts = {path: count_of(_read(path)) for path in self._paths}
        return {path: count for path, count in counts.items() if count is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
