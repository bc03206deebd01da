"""A warm process that forks ranks: torch and transformers are imported once, not once per rank.

Run as `python -m revivemoe.cluster.forkserver SOCKET LIFELINE [SEGMENT]` with inherited
descriptors. Our own rather than `multiprocessing`'s, because a rank's owner must get its pidfd
without a race, learn its exit status, keep the ranks apart from the fork server's own death, and
not re-import the caller's main module in every rank (docs/decisions.md).

Protocol, one message per datagram: in, a msgpack `Launch`; out, `Launched` (with the child's pidfd
attached) and `Exited`. It exits, killing its children, when the engine's end of the socket closes.
"""

import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec

from revivemoe.executor.spec import RankSpec, SegmentSpec

MAX_MESSAGE = 1 << 20
NO_SEGMENT = -1


class Hail(msgspec.Struct, frozen=True, tag=True):
    """First message in: the dimensions of the shared memory, if this instance uses any."""

    segment: SegmentSpec | None


class Warm(msgspec.Struct, frozen=True, tag=True):
    """First message out: imports are done. The segment's descriptor is attached if there is one."""

    preload_s: float


class Launch(msgspec.Struct, frozen=True, tag=True):
    spec: RankSpec


class Launched(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    status: int
    """As `os.waitstatus_to_exitcode`: negative for a signal."""


Reply = Warm | Launched | Exited


class ForkServer:
    """Forks ranks on request and reports their exits. Single-threaded: forking stays safe."""

    def __init__(self, sock: socket.socket, lifeline: int, segment_fd: int | None) -> None:
        self._sock, self._lifeline, self._segment_fd = sock, lifeline, segment_fd
        self._children: dict[int, tuple[int, RankSpec]] = {}
        """pidfd to (pid, spec)."""

    def run(self, run_rank: Callable[[RankSpec, int, int | None], int]) -> None:
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
                poller.register(self._fork(launch.spec, run_rank), select.POLLIN)

    def _receive(self) -> bytes:
        """One message; empty when the engine is gone, even if it left some of ours unread."""
        try:
            return self._sock.recv(MAX_MESSAGE)
        except ConnectionResetError:
            return b""

    def _fork(self, spec: RankSpec, run_rank: Callable[[RankSpec, int, int | None], int]) -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(self._child(spec, run_rank))
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, spec)
        self._send(Launched(spec.rank, spec.incarnation, pid), [pidfd])
        return pidfd

    def _child(self, spec: RankSpec, run_rank: Callable[[RankSpec, int, int | None], int]) -> int:
        """The rank: it must see neither Ctrl-C (the engine ends it) nor our descriptors."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._sock.close()
        for pidfd in self._children:
            os.close(pidfd)
        _name_process(f"revive-rank{spec.rank}")
        status = 1
        try:
            status = run_rank(spec, self._lifeline, self._segment_fd)
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


def _exit_at_once() -> NoReturn:
    """Taking the interpreter down with torch in it would take seconds, and somebody waits."""
    sys.stderr.flush()
    os._exit(0)


def _name_process(name: str) -> None:
    with open("/proc/self/comm", "w") as comm:
        comm.write(name[:15])


def main(argv: list[str]) -> None:
    """Preload, hail, serve."""
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock_fd, lifeline, segment_arg = (int(arg) for arg in argv)
    sock = socket.socket(fileno=sock_fd)
    _name_process("revive-fork")
    began = time.monotonic()
    from revivemoe.comm.dispatch import region_bytes
    from revivemoe.comm.shm import create_segment
    from revivemoe.executor.main import run_rank
    from revivemoe.executor.preload import preload

    hail = msgspec.msgpack.decode(sock.recv(MAX_MESSAGE), type=Hail)
    preload()
    segment_fd = None if segment_arg == NO_SEGMENT else segment_arg
    if segment_fd is None and (dims := hail.segment) is not None:
        size = region_bytes(dims.num_ranks, dims.max_tokens, dims.hidden, dims.itemsize, dims.top_k)
        segment_fd = create_segment(dims.num_ranks, size)
    warm = msgspec.msgpack.encode(Warm(time.monotonic() - began))
    socket.send_fds(sock, [warm], [] if segment_fd is None else [segment_fd])
    ForkServer(sock, lifeline, segment_fd).run(run_rank)
    _exit_at_once()


if __name__ == "__main__":
    main(sys.argv[1:])
