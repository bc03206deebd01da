"""What a process that the zygote has forked becomes: `revivemoe`, or some Python code.

A server runs `revivemoe.cli.main.main`; its fork server is a child of it, forked before anything
else happens, that runs `revivemoe.cluster.forkserver.main` once the launcher starts it. So only the
imports are not those of a command line, and the end of the interpreter, which is left out.
"""

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

import msgspec

from revivemoe.cli import main as main_module
from revivemoe.cluster import forkserver, launcher

MAX_ORDER = 1 << 16
FREE_FD = 200
"""Nothing has been opened from here on up."""
SOFT_FILES, HARD_FILES = "TEST_SOFT_FILES", "TEST_HARD_FILES"
"""Variables that limit the files a server may open; more than FREE_FD."""
REALLY_START = launcher.start_process


class Start(msgspec.Struct, frozen=True, tag=True):
    """`revivemoe` with these arguments."""

    arguments: list[str]
    environment: dict[str, str]


class Run(msgspec.Struct, frozen=True, tag=True):
    """As `python -c`."""

    code: str
    arguments: list[str]
    inherited: list[int]
    """What the arguments call the descriptors that come with this."""


def become(request: Start | Run, fds: list[int]) -> NoReturn:
    inherited = _take_standard_streams(fds)
    match request:
        case Run(code, arguments, numbers):
            sys.argv = ["-c", *renamed(arguments, numbers, inherited)]
            _run_and_exit(lambda: exec(code, {"__name__": "__main__"}))
        case Start(arguments, environment):
            os.environ.clear()
            os.environ.update(environment)
            _limit_files()
            tempfile.tempdir = None
            _become_command(arguments)


def _take_standard_streams(fds: list[int]) -> list[int]:
    """The first two become standard output and error. The others stay open, and nothing else."""
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, FREE_FD) for fd in fds]
    os.closerange(3, FREE_FD)
    os.closerange(max(kept) + 1, os.sysconf("SC_OPEN_MAX"))
    out, err, *inherited = kept
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, number in ((out, 1), (err, 2)):
        os.dup2(fd, number)
        os.close(fd)
    return inherited


def _limit_files() -> None:
    """As a shell's `ulimit -Sn` or `ulimit -Hn` before it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = int(os.environ.pop(HARD_FILES, hard))
    soft = int(os.environ.pop(SOFT_FILES, min(soft, hard)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _become_command(arguments: list[str]) -> NoReturn:
    spare = SpareForkServer()
    launcher.start_process = spare.start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [main_module.__file__, *arguments]
    sys.modules["__main__"].__package__ = "revivemoe.cli"  # as of `python -m`: usage lines tell it
    _run_and_exit(main_module.main)


def _run_and_exit(run: Callable[[], None]) -> NoReturn:
    """Exit as the interpreter would, without taking it down."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class SpareForkServer:
    """A server's fork server, forked before it has threads; waits to be told its descriptors.

    It ends with the server if it is never asked for. A second one is started the usual way.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _await_orders(theirs)
        theirs.close()
        self._sock: socket.socket | None = ours

    def start(
        self, arguments: list[str], fds: list[int]
    ) -> "ForkedChild | subprocess.Popen[bytes]":
        """As `launcher.start_process`."""
        if self._sock is None:
            return REALLY_START(arguments, fds)
        socket.send_fds(self._sock, [msgspec.msgpack.encode((arguments, fds))], fds)
        self._sock.close()
        self._sock = None
        return ForkedChild(self._pid)


def _await_orders(sock: socket.socket) -> NoReturn:
    raw, fds, _, _ = socket.recv_fds(sock, MAX_ORDER, 8)
    sock.close()
    if not raw:
        os._exit(0)
    _become_fork_server(*msgspec.msgpack.decode(raw, type=tuple[list[str], list[int]]), fds)


def _become_fork_server(arguments: list[str], numbers: list[int], fds: list[int]) -> NoReturn:
    os.setpgid(0, 0)  # as the launcher does: one session, so one share of the processor
    os.dup2(2, 1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _run_and_exit(lambda: forkserver.main(renamed(arguments, numbers, fds)))


def renamed(arguments: list[str], numbers: list[int], fds: list[int]) -> list[str]:
    """Descriptors have other numbers here than where the arguments were written."""
    new = {str(old): str(fd) for old, fd in zip(numbers, fds, strict=True)}
    return [new.get(argument, argument) for argument in arguments]


class ForkedChild:
    """What the launcher needs of a `Popen`, for a child of ours that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        if self._pidfd < 0:
            return
        waits_ms = None if timeout is None else timeout * 1000
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(waits_ms):
            raise subprocess.TimeoutExpired("fork server", timeout or 0.0)
        os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1

    def send_signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
