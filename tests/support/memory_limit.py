"""A memory cgroup for a process alone, where the kernel's killer strikes. v1 or v2; needs root."""

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
REMOVED_WITHIN_S = 5.0


class CannotLimit(Exception):
    """This host lets nobody make a memory cgroup; the text says why."""


@contextmanager
def limited(pids: Mapping[str, int], mebibytes: int) -> Iterator[None]:
    """Each process in a cgroup with its name, until they are gone. Raises CannotLimit."""
    made: list[Path] = []
    try:
        for name, pid in pids.items():
            made.append(_cgroup(name))
            _write(made[-1] / _limit_name(), mebibytes << 20)
            _write(made[-1] / "cgroup.procs", pid)
        yield
    finally:
        for cgroup in made:
            _remove(cgroup)


def _root() -> Path:
    """Where memory cgroups are made."""
    return MOUNT / "memory" if (MOUNT / "memory").is_dir() else MOUNT


def _limit_name() -> str:
    return "memory.limit_in_bytes" if _root() != MOUNT else "memory.max"


def _cgroup(name: str) -> Path:
    cgroup = _root() / name
    try:
        cgroup.mkdir(exist_ok=True)
    except OSError as error:
        raise CannotLimit(f"no memory cgroup can be made: {error}") from None
    return cgroup


def _write(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        raise CannotLimit(f"{path} cannot be set: {error}") from None


def _remove(cgroup: Path) -> None:
    """Whoever still lives there goes to the root. Who has just died is there a moment longer, for
    the kernel, than it can be waited for.
    """
    deadline = time.monotonic() + REMOVED_WITHIN_S
    while True:
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with suppress(CannotLimit):  # it has gone meanwhile
                _write(_root() / "cgroup.procs", int(pid))
        try:
            return cgroup.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
