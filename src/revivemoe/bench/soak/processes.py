"""The processes of one server: who they are, what they use, and who should be gone."""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil

from revivemoe.bench.soak.resources import Sample, Usage, median, summed
from revivemoe.bench.soak.strikes import fork_server

ENGINE, FORK_SERVER, RANK, ALL = "engine", "fork server", "a rank", "all"


class Family:
    """Everything the engine has brought about, seen from outside."""

    def __init__(self, engine_pid: int) -> None:
        self._engine = psutil.Process(engine_pid)
        self._seen: dict[int, psutil.Process] = {}

    def look(self, ranks: Collection[int]) -> None:
        """Remember who is there, be it below the engine or one of these."""
        found = [self._engine, *self._engine.children(recursive=True)]
        for pid in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        self._seen |= {process.pid: process for process in found}

    def living(self) -> list[psutil.Process]:
        """`is_running` tells a process from a later one of the same number."""
        return [p for p in self._seen.values() if _lives(p)]

    def strangers(self, ranks: Collection[int]) -> list[str]:
        """Processes that are neither engine nor fork server nor one of these; zombies, too, where
        it is the engine or the fork server that should have taken leave of them.
        """
        self.look(ranks)
        known = {self._engine.pid, fork_server(self._engine.pid).pid, *ranks}
        zombies = [c for c in self._engine.children(recursive=True) if _is_zombie(c)]
        return [str(p) for p in (*self.living(), *zombies) if p.pid not in known]

    def sample(self, ranks: Collection[int]) -> Sample:
        engine, forks = self._engine.pid, fork_server(self._engine.pid).pid
        of_ranks = [usage(pid) for pid in ranks]
        roles = {ENGINE: usage(engine), FORK_SERVER: usage(forks), RANK: median(of_ranks)}
        return {**roles, ALL: summed([roles[ENGINE], roles[FORK_SERVER], *of_ranks])}

    def segments(self) -> set[str]:
        """Shared memory that these processes hold open, by name and inode."""
        return {
            name
            for process in self.living()
            for name in _open_files(process.pid).values()
            if "memfd:" in name or name.startswith("/dev/shm/")
        }


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and not _is_zombie(process)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def usage(pid: int) -> Usage:
    """Raises FileNotFoundError or ProcessLookupError if it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Usage(
        _mb(status["VmRSS"]),
        _mb(status["RssShmem"]),
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
    )


def _mb(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) / 1024


def _open_files(pid: int) -> Mapping[int, str]:
    """Descriptor to what it leads to, with the inode."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(fd.name)] = f"{os.readlink(fd)} {fd.stat().st_ino}"
        except FileNotFoundError:
            continue
    return found
