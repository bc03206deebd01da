"""A warm process that forks ranks: torch and transformers are imported once, not once per rank.

Run as `python -m revivemoe.cluster.forkserver SOCKET LIFELINE SEGMENT CACHE` with inherited
descriptors (-1: none yet). Our own rather than `multiprocessing`'s, because a rank's owner must get
its pidfd without a race, learn its exit status, keep the ranks apart from the fork server's own
death, and not re-import the caller's main module in every rank (docs/decisions.md).

Protocol, one message per datagram: in, a msgpack `Launch`; out, `Launched` (with the child's pidfd
attached) or `Unlaunched`, and `Exited`. A child does nothing before its `Launched` is sent, and
ends if it never is. It exits, killing its children, when the engine's end of the socket closes.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from revivemoe.executor.spec import HostCacheSpec, RankSpec, SegmentSpec

MAX_MESSAGE = 1 << 20
PR_SET_PDEATHSIG = 1
NO_FD = -1
NOT_HANDED_OVER = 5
"""Exit status of a child on which the engine never got a handle."""
RunRank = Callable[[RankSpec, int, int | None, int | None], int]


class Hail(msgspec.Struct, frozen=True, tag=True):
    """First message in: what this instance uses."""

    segment: SegmentSpec | None
    host_cache: HostCacheSpec | None
    kernels: bool
    """Whether its ranks may want our own."""


class Warm(msgspec.Struct, frozen=True, tag=True):
    """First message out: imports are done. Descriptors of new shared memory are attached."""

    preload_s: float
    new_segment: bool
    new_cache: bool


class Launch(msgspec.Struct, frozen=True, tag=True):
    spec: RankSpec


class Launched(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    pid: int


class Unlaunched(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    reason: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    status: int
    """As `os.waitstatus_to_exitcode`: negative for a signal."""


Reply = Warm | Launched | Unlaunched | Exited


class ForkServer:
    """Forks ranks on request and reports their exits. Single-threaded: forking stays safe."""

    def __init__(
        self, sock: socket.socket, lifeline: int, segment_fd: int | None, cache_fd: int | None
    ) -> None:
        self._sock, self._lifeline = sock, lifeline
        self._segment_fd, self._cache_fd = segment_fd, cache_fd
        self._children: dict[int, tuple[int, RankSpec]] = {}
        """pidfd to (pid, spec)."""

    def run(self, run_rank: RunRank) -> None:
        """Serve until the engine goes away."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd != self._sock.fileno():
                    poller.unregister(fd)
                    self._reap(fd)
                    continue
                raw = self._receive()
                if not raw:
                    self._kill_all()
                    return
                launch = msgspec.msgpack.decode(raw, type=Launch)
                pidfd = self._launch(launch.spec, run_rank)
                if pidfd is not None:
                    poller.register(pidfd, select.POLLIN)

    def _receive(self) -> bytes:
        """One message; empty when the engine is gone, even if it left some of ours unread."""
        try:
            return self._sock.recv(MAX_MESSAGE)
        except ConnectionResetError:
            return b""

    def _launch(self, spec: RankSpec, run_rank: RunRank) -> int | None:
        """Returns the child's pidfd, if there is one."""
        try:
            go, let_go = os.pipe()
            pid, pidfd = self._fork(spec, run_rank, go, let_go)
        except OSError as error:  # there may be no more processes, or no memory for one
            self._send(Unlaunched(spec.rank, spec.incarnation, str(error)), [])
            return None
        else:
            self._children[pidfd] = (pid, spec)
            self._send(Launched(spec.rank, spec.incarnation, pid), [pidfd])
            with contextlib.suppress(BrokenPipeError):  # it has been killed meanwhile
                os.write(let_go, b"!")
            return pidfd
        finally:
            os.close(go)
            os.close(let_go)

    def _fork(self, spec: RankSpec, run_rank: RunRank, go: int, let_go: int) -> tuple[int, int]:
        """The child's pid and pidfd. It waits for a byte from `go`."""
        pid = os.fork()
        if pid == 0:
            os.close(let_go)
            self._child(spec, run_rank, go)
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _child(self, spec: RankSpec, run_rank: RunRank, go: int) -> NoReturn:
        """The rank: it must see neither Ctrl-C (the engine ends it) nor our descriptors."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._sock.close()
            for pidfd in self._children:
                os.close(pidfd)
            if not _handed_over(go, self._lifeline):
                os._exit(NOT_HANDED_OVER)
            os.close(go)
            _name_process(f"revive-rank{spec.rank}")
            status = run_rank(spec, self._lifeline, self._segment_fd, self._cache_fd)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self, pidfd: int) -> None:
        pid, spec = self._children.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send(Exited(spec.rank, spec.incarnation, os.waitstatus_to_exitcode(status)), [])

    def _kill_all(self) -> None:
        """SIGKILL reaches stopped processes too; their owner is gone."""
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)

    def _send(self, reply: Reply, fds: list[int]) -> None:
        try:
            socket.send_fds(self._sock, [msgspec.msgpack.encode(reply)], fds)
        except OSError:
            self._kill_all()
            _exit_at_once()


def _handed_over(go: int, lifeline: int) -> bool:
    """Whether the engine has a handle on this process; waits until that is certain."""
    poller = select.poll()
    poller.register(go, select.POLLIN)
    poller.register(lifeline, select.POLLIN)
    return go in dict(poller.poll()) and os.read(go, 1) != b""


def _exit_at_once() -> NoReturn:
    """Taking the interpreter down with torch in it would take seconds, and somebody waits."""
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(wanted: bool) -> None:
    """SIGKILL when the process that started this one ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0, 0, 0, 0)


def _name_process(name: str) -> None:
    with open("/proc/self/comm", "w") as comm:
        comm.write(name[:15])


def main(argv: list[str]) -> None:
    """Preload, hail, serve."""
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent(True)  # nobody looks at the lifeline meanwhile
    sock_fd, lifeline, segment_arg, cache_arg = (int(arg) for arg in argv)
    sock = socket.socket(fileno=sock_fd)
    _name_process("revive-fork")
    began = time.monotonic()
    from revivemoe.cluster.compiler import provide_kernels
    from revivemoe.executor.main import run_rank
    from revivemoe.executor.preload import preload
    from revivemoe.kernels.library import do_without

    preload()
    loaded_s = time.monotonic() - began
    raw = sock.recv(MAX_MESSAGE)
    if not raw:
        _exit_at_once()
    _end_with_parent(False)  # what it starts from now on it has to end first
    began = time.monotonic() - loaded_s
    hail = msgspec.msgpack.decode(raw, type=Hail)
    if hail.kernels:
        provide_kernels()  # after torch, whose threads they share
    else:
        do_without("they are not wanted here")
    segment_fd = None if segment_arg == NO_FD else segment_arg
    cache_fd = None if cache_arg == NO_FD else cache_arg
    new_segment = segment_fd is None and hail.segment is not None
    new_cache = cache_fd is None and hail.host_cache is not None
    if new_segment:
        segment_fd = _make_segment(hail.segment)
    if new_cache:
        cache_fd = _make_cache(hail.host_cache)
    fds = [fd for fd, new in ((segment_fd, new_segment), (cache_fd, new_cache)) if new]
    warm = msgspec.msgpack.encode(Warm(time.monotonic() - began, new_segment, new_cache))
    socket.send_fds(sock, [warm], [fd for fd in fds if fd is not None])
    ForkServer(sock, lifeline, segment_fd, cache_fd).run(run_rank)
    _exit_at_once()


def _make_segment(dims: SegmentSpec | None) -> int:
    from revivemoe.comm.dispatch import region_bytes
    from revivemoe.comm.shm import create_segment

    assert dims is not None
    size = region_bytes(dims.num_ranks, dims.max_tokens, dims.hidden, dims.itemsize, dims.top_k)
    return create_segment(dims.num_ranks, size, dims.channels)


def _make_cache(spec: HostCacheSpec | None) -> int:
    import torch

    from revivemoe.model.host_cache import create_host_cache, expert_bytes

    assert spec is not None
    size = expert_bytes(Path(spec.model_dir), getattr(torch, spec.dtype))
    return create_host_cache(spec.layers, spec.num_experts, size)


if __name__ == "__main__":
    main(sys.argv[1:])
