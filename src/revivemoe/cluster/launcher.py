"""The engine's side of the fork server: start it, launch ranks, hear of their exits."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import msgspec

from revivemoe.cluster.forkserver import (
    MAX_MESSAGE,
    NO_FD,
    Exited,
    Hail,
    Launch,
    Launched,
    Reply,
    Unlaunched,
    Warm,
)
from revivemoe.executor.spec import HostCacheSpec, RankSpec, SegmentSpec

log = logging.getLogger("revivemoe.cluster")

RESTART_WAIT_S = 0.5
"""For a fork server that has hung up to be gone; it is not in the way of another."""
SPINS = "20000"
"""Of OpenMP's threads (GNU's) before they sleep: some tenths of a millisecond. Left to itself it is
for ever, while what all wait for stands in the kernel's queue: steps of 0.65 s instead of 0.025
(decisions.md). With less they sleep between two products, and waking them takes longer."""
STDERR = 2
"""As a descriptor: `sys.stderr` may be something else."""
MAX_FDS = 2
"""That come with one message."""


@dataclass(frozen=True)
class LaunchedProcess:
    """A running rank process. `pidfd` becomes readable when it exits; the receiver owns it."""

    launched: Launched
    pidfd: int | None
    """None: it got lost, since this process has as many descriptors as it may have."""


def start_process(arguments: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
    """A fork server that inherits these descriptors; its arguments name them.

    A process group of its own, so that Ctrl-C is the engine's alone; not a session of its own:
    Linux shares the processor out by session first (autogroup), and left a runnable engine
    standing for seconds while ranks were busy (decisions.md).
    """
    return subprocess.Popen(
        [sys.executable, "-m", "revivemoe.cluster.forkserver", *arguments],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=STDERR,
        env={**spinning(os.environ), "TOKENIZERS_PARALLELISM": "false"},
        process_group=0,
    )


def spinning(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with a bound to spinning unless it says something about that."""
    said = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys()
    return {**environment, **({} if said else {"GOMP_SPINCOUNT": SPINS})}


def begin(lifeline: int, shared: Sequence[int | None]) -> "Begun":
    """Start a fork server that inherits these. Its imports take seconds; then it waits for what it
    is to know of the instance.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
    numbers = [NO_FD if fd is None else fd for fd in shared]
    fds = [theirs.fileno(), lifeline, *(fd for fd in numbers if fd != NO_FD)]
    process = start_process([str(theirs.fileno()), str(lifeline), *map(str, numbers)], fds)
    theirs.close()
    ours.setblocking(False)
    return Begun(process, ours)


class Begun(NamedTuple):
    process: subprocess.Popen[bytes]
    sock: socket.socket


class EarlyStart:
    """A fork server whose imports begin while it is still found out what they are for. A context
    manager; leaving it ends the fork server, unless a `Launcher` has taken it over.
    """

    def __init__(self) -> None:
        self.lifeline = os.pipe()
        self._begun: Begun | None = begin(self.lifeline[0], (None, None))

    def take(self) -> Begun:
        """From now on it is the caller's, and so is the lifeline."""
        begun, self._begun = self._begun, None
        assert begun is not None, "taken over already"
        return begun

    def __enter__(self) -> "EarlyStart":
        return self

    def __exit__(self, *raised: object) -> None:
        if self._begun is None:
            return
        begun = self.take()
        begun.process.kill()
        begun.process.wait()
        begun.sock.close()
        for fd in self.lifeline:
            os.close(fd)


class Launcher:
    """Owns the fork server and shared memory. A context manager; leaving it ends all ranks."""

    def __init__(
        self,
        segment: SegmentSpec | None,
        host_cache: HostCacheSpec | None = None,
        kernels: bool = True,
        early: EarlyStart | None = None,
    ) -> None:
        """`kernels`: ranks may want our own, which are built if they are not there. `early`: the
        first fork server.
        """
        self._hail = Hail(segment, host_cache, kernels)
        self._segment_fd: int | None = None
        self._cache_fd: int | None = None
        self._early = early
        self._lifeline_read, self._lifeline_write = os.pipe() if early is None else early.lifeline
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the fork server; it answers with `Warm` when its imports are done (seconds)."""
        if self._early is not None:
            begun, self._early = self._early.take(), None
        else:
            begun = begin(self._lifeline_read, (self._segment_fd, self._cache_fd))
        self._process, self._sock = begun
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` tells
            self._sock.send(msgspec.msgpack.encode(self._hail))

    def restart(self) -> None:
        """Start another fork server after the former one is gone. Ranks and segment stay."""
        assert self._process is not None, "never started"
        assert self._sock is not None, "never started"
        self._sock.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(RESTART_WAIT_S)
        self.start()

    def kill(self) -> None:
        """End the fork server alone: `receive` tells when it is gone."""
        assert self._process is not None, "never started"
        self._process.kill()

    @property
    def fileno(self) -> int:
        """Readable when the fork server has something to say, or is gone."""
        assert self._sock is not None, "the fork server is not running"
        return self._sock.fileno()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the fork server is not running"
        return self._process.pid

    def launch(self, spec: RankSpec) -> None:
        """Ask for a rank process; a `LaunchedProcess` follows."""
        assert self._sock is not None, "the fork server is not running"
        self._sock.send(msgspec.msgpack.encode(Launch(spec)))

    def receive(self) -> Warm | LaunchedProcess | Unlaunched | Exited | None:
        """One message, without blocking. None: the fork server is gone, and has said no more.

        Raises BlockingIOError when there is nothing.
        """
        raw, fds = self._receive()
        if not raw:
            return None
        match msgspec.msgpack.decode(raw, type=Reply):
            case Warm() as warm:
                if warm.new_segment:
                    self._segment_fd = fds.pop(0)
                if warm.new_cache:
                    self._cache_fd = fds.pop(0)
                return warm
            case Launched() as launched:
                return LaunchedProcess(launched, fds[0] if fds else None)
            case Unlaunched() | Exited() as reply:
                return reply
            case unknown:
                assert_never(unknown)

    def _receive(self) -> tuple[bytes, list[int]]:
        assert self._sock is not None, "the fork server is not running"
        try:
            return socket.recv_fds(self._sock, MAX_MESSAGE, MAX_FDS)[:2]
        except ConnectionResetError:  # it left a launch unread; what it said before is still there
            return socket.recv_fds(self._sock, MAX_MESSAGE, MAX_FDS)[:2]

    def close(self, timeout_s: float = 2.0) -> None:
        """Close the socket and the lifeline: fork server and ranks exit; kill what does not."""
        if self._early is not None:  # not taken over
            self._lifeline_write = self._lifeline_read = -1
        owned = (self._lifeline_write, self._lifeline_read, self._segment_fd, self._cache_fd)
        for fd in owned:
            if fd is not None and fd >= 0:
                os.close(fd)
        self._lifeline_write = self._lifeline_read = -1
        self._segment_fd = self._cache_fd = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            _end(self._process, timeout_s)
            self._process = None


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for it to exit, then kill it and wait once more."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("fork server %d does not die after SIGKILL", process.pid)
