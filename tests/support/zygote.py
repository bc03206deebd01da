"""A process with everything imported, from which the tests' servers are forked.

A `revivemoe serve` imports torch and transformers, and its fork server does once more: ten seconds
of processor time that say nothing about the test that waits for them. Run with the number of a
socket; the other end is `support.warm`, and what a forked process does is in `support.forked`.
Tests of starting and ending use true command lines (test_lifecycle, test_bad_input).

One request per message: in, a `Start` or `Run` with the descriptors of a pipe for the exit status,
of standard output and error, and of what is to be inherited; out, a `Started` with the process's
pidfd.
"""

import importlib
import os
import select
import signal
import socket
import sys
import threading

import msgspec
from support.forked import Run, Start, become

MAX_MESSAGE = 1 << 20
ARCHS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe")
PRELOADED = (
    "revivemoe.cli.app",
    "revivemoe.cli.serve_run",
    "revivemoe.server.app",
    "revivemoe.server.run",
    "revivemoe.serving.instance",
    "revivemoe.executor.main",
    "transformers.models.auto.tokenization_auto",
    *(f"transformers.models.{arch}.modeling_{arch}" for arch in ARCHS),
)


class Started(msgspec.Struct, frozen=True):
    pid: int


# ---- the zygote -----------------------------------------------------------------------------


def main(sock: socket.socket) -> None:
    """Import, then fork on request until the tests are gone; whatever still runs goes with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from revivemoe.executor.preload import preload

    preload()
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "threads do not live on in what is forked"
    Zygote(sock).run()


class Zygote:
    """Forks, and tells exit statuses. Single-threaded, as the fork server, and for its reason."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)  # who waits for one request does not see a child end
        self._children: dict[int, tuple[int, int]] = {}
        """pidfd to the pid and where its exit status goes."""

    def run(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd != self._sock.fileno():
                    poller.unregister(fd)
                    self._reap(fd)
                    continue
                try:
                    raw, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 10)
                except BlockingIOError:
                    continue
                if not raw:
                    self._kill_all()
                    return
                request = msgspec.msgpack.decode(raw, type=Start | Run)
                poller.register(self._fork(request, fds), select.POLLIN)

    def _fork(self, request: Start | Run, fds: list[int]) -> int:
        pid = os.fork()
        if pid == 0:
            os.close(fds.pop(0))
            become(request, fds)
        for fd in fds[1:]:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, fds[0])
        socket.send_fds(self._sock, [msgspec.msgpack.encode(Started(pid))], [pidfd])
        return pidfd

    def _reap(self, pidfd: int) -> None:
        pid, status = self._children.pop(pidfd)
        _, code = os.waitpid(pid, 0)
        os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
        os.close(status)
        os.close(pidfd)

    def _kill_all(self) -> None:
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
