"""The control groups (v1, v2) that this process lives in.

A limit of any group along the path to the root counts. In a container the own group is often the
root of the mount, whatever its name, and what lies above is not seen.
"""

from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""v1 has no word for it, but the largest number of bytes in pages."""


class Place(NamedTuple):
    version: int
    root: Path
    own: Path
    """Where it would be if the whole tree were seen."""

    def along(self) -> list[Path]:
        """What is there of the own group and those above it, the innermost first."""
        between = [self.own, *self.own.parents]
        return [path for path in between if path.is_relative_to(self.root) and path.is_dir()]


def places(cgroups: str, controller: str, mount: Path = MOUNT) -> list[Place]:
    """Where a controller's group may be, from the text of `/proc/self/cgroup`."""
    found = []
    for line in cgroups.splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            roots = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            roots = [mount / controller]
        else:
            continue
        inside = [part for part in own.split("/") if part not in ("", "..")]
        version = 1 if controllers else 2
        found += [Place(version, root, root.joinpath(*inside)) for root in roots]
    return found


def own_places(controller: str) -> list[Place]:
    return places(read(OWN), controller)


def read(path: Path) -> str:
    """Empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def number(text: str) -> int | None:
    """A limit or a count; None for what is none: `max`, v1's largest, nothing."""
    text = text.strip()
    if not text.isdecimal() or int(text) >= UNLIMITED:
        return None
    return int(text)
