"""Servers that start at once: forked from the session's zygote, which has imported everything."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec
from support.forked import Run, Start
from support.zygote import MAX_MESSAGE, Started

IMPORTED_WITHIN_S = 120.0
RUN_S = 60.0
FORK_SERVER = """
import os, sys
from revivemoe.cluster.forkserver import main

os.setpgid(0, 0)
main(sys.argv[1:])
"""


class ForkedServer:
    """What is needed of a `Popen`, for a process that is the zygote's child and not ours."""

    def __init__(self, pid: int, pidfd: int, status: int) -> None:
        self.pid, self.returncode = pid, None
        self._pidfd, self._status = pidfd, status

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._status, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("revivemoe", timeout or 0.0)
            self.returncode = int(os.read(self._status, 100))
            os.close(self._status)
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """Starts importing when it is made; the first server waits for it."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(IMPORTED_WITHIN_S)
        tests, path = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{tests}:{path}" if path else tests},
            )

    def start(self, arguments: list[str], out: int, err: int, **environment: str) -> ForkedServer:
        """`revivemoe` with these arguments, in this environment and with what is added to it."""
        return self._ask(Start(arguments, {**os.environ, **environment}), [out, err])

    def start_fork_server(self, arguments: list[str], fds: list[int]) -> ForkedServer:
        """As `launcher.start_process`."""
        return self._ask(Run(FORK_SERVER, arguments, fds), [2, 2, *fds])

    def run(self, code: str, *arguments: str, fds: Sequence[int] = ()) -> str:
        """Python code in a process of its own, which inherits these; what it prints."""
        with tempfile.TemporaryFile("w+") as out:
            request = Run(code, list(arguments), list(fds))
            process = self._ask(request, [out.fileno(), 2, *fds])
            status = process.wait(RUN_S)
            out.seek(0)
            printed = out.read()
        assert status == 0, f"exit status {status}: {printed}"
        return printed

    def _ask(self, request: Start | Run, fds: list[int]) -> ForkedServer:
        status, status_end = os.pipe()
        socket.send_fds(self._sock, [msgspec.msgpack.encode(request)], [status_end, *fds])
        os.close(status_end)
        raw, (pidfd,), _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 1)
        return ForkedServer(msgspec.msgpack.decode(raw, type=Started).pid, pidfd, status)

    def close(self) -> None:
        """End it, and whatever it has forked that still runs."""
        self._sock.close()
        self._process.wait()


@cache
def zygote() -> Zygote:
    """The session's; conftest.py ends it."""
    return Zygote()
