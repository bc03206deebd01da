"""Ranks as processes of this host: launched by the fork server, reached over ZeroMQ.

One PUSH socket per rank process (bound by the rank, so commands sent early wait for it) and one
PULL socket for everything ranks say. A pidfd per process tells of its exit at once, whoever its
parent is.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from revivemoe.cluster.forkserver import Exited, Warm
from revivemoe.cluster.launcher import LaunchedProcess, Launcher
from revivemoe.cluster.store import GroupStore
from revivemoe.executor.spec import HostCacheSpec, RankSpec, SegmentSpec
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.commands import Command, DomainSpec
from revivemoe.messages.reports import Report

log = logging.getLogger("revivemoe.cluster")

DRAIN_AT_MOST = 2000
"""Reports taken in one go before other work of the event loop gets its turn."""

STATUS_WAIT_S = 0.015
"""How long the exit of a process waits for its exit status."""
CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)
"""Signals that a process brings upon itself."""

RankSpecFor = Callable[[RankId, Incarnation, tuple[tuple[int, ...], ...]], RankSpec]
Key = tuple[RankId, Incarnation]


@dataclass(frozen=True)
class Callbacks:
    """What the cluster tells its owner, on the event loop's thread."""

    on_report: Callable[[Report], None]
    on_exit: Callable[[RankId, Incarnation, str, bool], None]
    """With what is known of the exit, and whether the process crashed by itself."""
    on_forkserver_gone: Callable[[], None]


class LocalCluster:
    """Owns fork server, sockets and pidfds. An async context manager; leaving it ends all ranks."""

    def __init__(
        self,
        spec_for: RankSpecFor,
        segment: SegmentSpec | None,
        backend: str,
        callbacks: Callbacks,
        host_cache: HostCacheSpec | None = None,
        channels: int = 1,
    ) -> None:
        token = secrets.token_hex(8)
        self.reports = f"ipc://@revivemoe-{token}-reports"
        self._token, self._channels = token, channels
        self._spec_for, self._callbacks, self._backend = spec_for, callbacks, backend
        self._launcher = Launcher(segment, host_cache)
        self._store = GroupStore() if backend in ("gloo", "nccl") else None
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outboxes: dict[RankId, tuple[Key, zmq.Socket[bytes]]] = {}
        self._pidfds: dict[Key, int] = {}
        self._pids: dict[Key, int] = {}
        self._launch_when_warm: list[RankSpec] = []
        self._warm = False
        self._forkserver_gone = False
        self._exits: dict[Key, int] = {}
        """Exit status of processes whose exit has not been told of yet."""
        self._ending: dict[Key, asyncio.TimerHandle] = {}
        """Processes that are gone and whose exit status is awaited, for a moment."""
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._encoder = msgspec.msgpack.Encoder()
        self._last_command: Command | None = None
        self._last_bytes = b""

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @property
    def _inbox_fd(self) -> int:
        return int(self._inbox.getsockopt(zmq.FD))

    async def __aenter__(self) -> "LocalCluster":
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.bind(self.reports)
        self._launcher.start()
        if self._store is not None:
            await self._loop.run_in_executor(None, self._store.start)
        self._loop.add_reader(self._inbox_fd, self.drain)
        self._loop.add_reader(self._launcher.fileno, self._on_launcher)
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._loop.remove_reader(self._inbox_fd)
        with contextlib.suppress(AssertionError):
            self._loop.remove_reader(self._launcher.fileno)
        for timer in self._ending.values():
            timer.cancel()
        for key, pidfd in list(self._pidfds.items()):
            _kill(pidfd)
            self._forget(key)
        for _, outbox in self._outboxes.values():
            outbox.close(linger=0)
        self._inbox.close(linger=0)
        self._context.term()
        await self._loop.run_in_executor(None, self._launcher.close)
        if self._store is not None:
            self._store.close()

    # ---- what the engine asks for ------------------------------------------------------------

    def launch(
        self, rank: RankId, incarnation: Incarnation, slots: tuple[tuple[int, ...], ...]
    ) -> None:
        """Start a process for a rank; its exit and its reports come through the callbacks."""
        spec = self._spec_for(rank, incarnation, slots)
        spec = msgspec.structs.replace(
            spec,
            commands=f"ipc://@revivemoe-{self._token}-{rank}.{incarnation}",
            reports=self.reports,
            weights=self._weights((rank, incarnation)),
        )
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.setsockopt(zmq.RECONNECT_IVL, 10)
        outbox.connect(spec.commands)
        if rank in self._outboxes:
            self._outboxes.pop(rank)[1].close(linger=0)
        self._outboxes[rank] = ((rank, incarnation), outbox)
        if self._forkserver_gone:  # a new one is warm in a few seconds; what is to start waits
            self._forkserver_gone, self._warm = False, False
            self._launcher.restart()
            self._loop.add_reader(self._launcher.fileno, self._on_launcher)
        if self._warm:
            self._launcher.launch(spec)
        else:
            self._launch_when_warm.append(spec)

    def send(self, rank: RankId, command: Command) -> None:
        """Queue a command. Never blocks; what is sent to a dead rank goes nowhere."""
        held = self._outboxes.get(rank)
        if held is not None:
            with contextlib.suppress(zmq.Again):
                held[1].send(self._encoded(command), zmq.NOBLOCK)

    def _encoded(self, command: Command) -> bytes:
        """A broadcast sends the same object to all: it is encoded once."""
        if command is not self._last_command:
            self._last_command, self._last_bytes = command, self._encoder.encode(command)
        return self._last_bytes

    def kill(self, rank: RankId) -> None:
        """SIGKILL the rank's present process. Nobody waits for it."""
        held = self._outboxes.get(rank)
        if held is not None and held[0] in self._pidfds:
            _kill(self._pidfds[held[0]])

    def pid(self, rank: RankId) -> int | None:
        """The rank's present process, if it runs."""
        held = self._outboxes.get(rank)
        return None if held is None else self._pids.get(held[0])

    def domain(self) -> DomainSpec:
        address = self._store.address if self._store is not None else None
        weights = {rank: self._weights(key) for rank, (key, _) in self._outboxes.items()}
        return DomainSpec(
            backend=self._backend, store_address=address, channels=self._channels, weights=weights
        )

    def _weights(self, key: Key) -> str:
        return f"ipc://@revivemoe-{self._token}-{key[0]}.{key[1]}-weights"

    @property
    def living(self) -> int:
        """Processes that have not exited."""
        return len(self._pidfds)

    # ---- what happens ------------------------------------------------------------------------

    def drain(self) -> None:
        """Take in every report that has come (the socket's descriptor is edge-triggered)."""
        for _ in range(DRAIN_AT_MOST):
            try:
                raw = self._inbox.recv(zmq.NOBLOCK)
            except (zmq.Again, zmq.ZMQError):
                return
            self._callbacks.on_report(self._decoder.decode(raw))
        self._loop.call_soon(self.drain)

    def _on_launcher(self) -> None:
        while True:
            try:
                message = self._launcher.receive()
            except BlockingIOError:
                return
            match message:
                case Warm():
                    self._on_warm(message)
                case LaunchedProcess():
                    self._watch(message)
                case Exited():
                    key = (RankId(message.rank), Incarnation(message.incarnation))
                    self._exits[key] = message.status
                    if key in self._ending:
                        self._tell_exit(key)
                case None:
                    self._loop.remove_reader(self._launcher.fileno)
                    self._forkserver_gone = True
                    self._callbacks.on_forkserver_gone()
                    return

    def _on_warm(self, warm: Warm) -> None:
        log.info("fork server warm after %.1f s", warm.preload_s)
        self._warm = True
        waiting, self._launch_when_warm = self._launch_when_warm, []
        for spec in waiting:
            self._launcher.launch(spec)

    def _watch(self, process: LaunchedProcess) -> None:
        key = (RankId(process.launched.rank), Incarnation(process.launched.incarnation))
        self._pidfds[key], self._pids[key] = process.pidfd, process.launched.pid
        self._loop.add_reader(process.pidfd, self._on_exit, key)

    def _on_exit(self, key: Key) -> None:
        """The process is gone. How it ended, the fork server says about now."""
        self._loop.remove_reader(self._pidfds[key])
        if not self._forkserver_gone:
            self._on_launcher()
        if key in self._exits or self._forkserver_gone:
            self._tell_exit(key)
        else:
            self._ending[key] = self._loop.call_later(STATUS_WAIT_S, self._tell_exit, key)

    def _tell_exit(self, key: Key) -> None:
        """What the process said before it went counts: the inbox comes first."""
        if key not in self._pidfds:
            return  # told already
        if (timer := self._ending.pop(key, None)) is not None:
            timer.cancel()
        pid, status = self._pids[key], self._exits.pop(key, None)
        self._forget(key)
        self.drain()
        held = self._outboxes.get(key[0])
        if held is not None and held[0] == key:
            self._outboxes.pop(key[0])[1].close(linger=0)
        how = "exited" if status is None else describe_status(status)
        by_itself = status is not None and (status > 0 or -status in CRASHES)
        self._callbacks.on_exit(*key, f"process {pid}: {how}", by_itself)

    def _forget(self, key: Key) -> None:
        pidfd = self._pidfds.pop(key)
        self._pids.pop(key)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has gone meanwhile
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def describe_status(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
