"""A fork server played by the test: real socket, real pidfds of processes that only sleep."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from revivemoe.cluster import launcher
from revivemoe.cluster.forkserver import (
    MAX_MESSAGE,
    Exited,
    Hail,
    Launch,
    Launched,
    Reply,
    Unlaunched,
    Warm,
)

Process = subprocess.Popen[bytes]


class PlayedForkServer:
    """Also what the launcher needs of its `Popen`."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.starts = 0
        self.sock: socket.socket | None = None
        self.processes: list[Process] = []
        self.start_error: OSError | None = None

    # ---- for the launcher --------------------------------------------------------------------

    def start(self, arguments: list[str], fds: list[int]) -> "PlayedForkServer":
        if self.start_error is not None:
            raise self.start_error
        self.starts += 1
        self.sock = socket.socket(fileno=os.dup(fds[0]))
        return self

    def kill(self) -> None:
        self.die()

    def wait(self, timeout: float | None = None) -> int:
        return 0

    # ---- for the test ------------------------------------------------------------------------

    def send(self, reply: Reply, *fds: int) -> None:
        assert self.sock is not None
        socket.send_fds(self.sock, [msgspec.msgpack.encode(reply)], fds)

    def warm(self) -> None:
        assert isinstance(self.receive(), Hail)
        self.send(Warm(0.0, False, False))

    def receive(self) -> Hail | Launch:
        assert self.sock is not None
        self.sock.settimeout(1.0)
        return msgspec.msgpack.decode(self.sock.recv(MAX_MESSAGE), type=Hail | Launch)

    def fork(self, rank: int = 0, incarnation: int = 1) -> Process:
        """A process comes, as asked for."""
        process = subprocess.Popen(["sleep", "60"])
        self.processes.append(process)
        pidfd = os.pidfd_open(process.pid)
        self.send(Launched(rank, incarnation, process.pid), pidfd)
        os.close(pidfd)
        return process

    def refuse(self, rank: int, incarnation: int, reason: str) -> None:
        self.send(Unlaunched(rank, incarnation, reason))

    def tell_exit(self, status: int, rank: int = 0, incarnation: int = 1) -> None:
        self.send(Exited(rank, incarnation, status))

    def die(self) -> None:
        assert self.sock is not None
        self.sock.close()


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedForkServer]:
    played = PlayedForkServer()
    monkeypatch.setattr(launcher, "start_process", played.start)
    try:
        yield played
    finally:
        for process in played.processes:
            process.kill()
            process.wait()
        if played.sock is not None:
            played.sock.close()


async def until(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    """Let the event loop run."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0.001)


def was_killed(process: Process) -> bool:
    return process.wait(5.0) == -signal.SIGKILL
