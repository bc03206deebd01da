"""Ranks as processes of this host: launched by the fork server, reached over ZeroMQ.

One PUSH socket per rank process (bound by the rank, so commands sent early wait for it) and one
PULL socket for everything ranks say. A pidfd per process tells of its exit at once, whoever its
parent is.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVarTuple

import msgspec
import zmq

from revivemoe.cluster.launcher import EarlyStart, Launcher
from revivemoe.cluster.processes import Key, ProcessCallbacks, Processes
from revivemoe.cluster.store import GroupStore
from revivemoe.executor.spec import HostCacheSpec, RankSpec, SegmentSpec
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.commands import Command, DomainSpec
from revivemoe.messages.complaints import Complaints
from revivemoe.messages.reports import Report

log = logging.getLogger("revivemoe.cluster")

DRAIN_AT_MOST = 2000
"""Reports taken in one go before other work of the event loop gets its turn."""

Told = TypeVarTuple("Told")
RankSpecFor = Callable[[RankId, Incarnation, tuple[tuple[int, ...], ...]], RankSpec]


@dataclass(frozen=True)
class Callbacks:
    """What the cluster tells its owner, on the event loop's thread.

    An exception of one is logged, and what is to be told after that is still told.
    """

    on_report: Callable[[Report], None]
    on_arrived: Callable[[RankId, Incarnation, int], None]
    """A process that was launched is there. With its pid."""
    on_exit: Callable[[RankId, Incarnation, str, bool], None]
    """Once for every launch, also if its process never came. With what is known of the exit, and
    whether what it ran may have brought it about; otherwise somebody killed it."""
    on_forkserver_gone: Callable[[], None]


class LocalCluster:
    """Owns processes and sockets. An async context manager; leaving it ends all ranks."""

    def __init__(
        self,
        spec_for: RankSpecFor,
        segment: SegmentSpec | None,
        backend: str,
        callbacks: Callbacks,
        host_cache: HostCacheSpec | None = None,
        channels: int = 1,
        kernels: bool = True,
        early: EarlyStart | None = None,
    ) -> None:
        token = secrets.token_hex(8)
        self.reports = f"ipc://@revivemoe-{token}-reports"
        self._token, self._channels = token, channels
        self._spec_for, self._callbacks, self._backend = spec_for, callbacks, backend
        told = ProcessCallbacks(self._on_arrived, self._on_exit, self._on_forkserver_gone)
        self._processes = Processes(Launcher(segment, host_cache, kernels, early), told)
        self._store = GroupStore() if backend in ("gloo", "nccl") else None
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outboxes: dict[RankId, tuple[Key, zmq.Socket[bytes]]] = {}
        self._garbled = Complaints("messages of ranks that cannot be decoded", _log_garbled)
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
        self._processes.start()
        if self._store is not None:
            await self._loop.run_in_executor(None, self._store.start)
        self._loop.add_reader(self._inbox_fd, self.drain)
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._loop.remove_reader(self._inbox_fd)
        await self._processes.close()
        for _, outbox in self._outboxes.values():
            outbox.close(linger=0)
        self._inbox.close(linger=0)
        self._context.term()
        if self._store is not None:
            self._store.close()

    # ---- what the engine asks for ------------------------------------------------------------

    def launch(
        self, rank: RankId, incarnation: Incarnation, slots: tuple[tuple[int, ...], ...]
    ) -> None:
        """Start a process for a rank; all about it comes through the callbacks. Never raises."""
        key = (rank, incarnation)
        spec = msgspec.structs.replace(
            self._spec_for(rank, incarnation, slots),
            commands=f"ipc://@revivemoe-{self._token}-{rank}.{incarnation}",
            reports=self.reports,
            weights=self._weights(key),
        )
        try:
            outbox = self._outbox_to(spec.commands)
        except zmq.ZMQError as error:  # no descriptor is left
            self._loop.call_soon(self._on_exit, key, f"no socket for its commands: {error}", False)
            return
        if rank in self._outboxes:
            self._outboxes.pop(rank)[1].close(linger=0)
        self._outboxes[rank] = (key, outbox)
        self._processes.launch(spec)

    def _outbox_to(self, endpoint: str) -> "zmq.Socket[bytes]":
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.setsockopt(zmq.RECONNECT_IVL, 10)
        outbox.connect(endpoint)
        return outbox

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
        """SIGKILL the rank's present process, or see to it that it does not come to life. May be
        said again. Nobody waits for it."""
        held = self._outboxes.get(rank)
        if held is not None:
            self._processes.kill(held[0])

    def pid(self, rank: RankId) -> int | None:
        """The rank's present process, if it runs."""
        held = self._outboxes.get(rank)
        return None if held is None else self._processes.pid(held[0])

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
        return self._processes.running

    @property
    def garbled(self) -> int:
        """Messages that could not be decoded, so far."""
        return self._garbled.count

    # ---- what happens ------------------------------------------------------------------------

    def drain(self) -> None:
        """Take in every report that has come (the socket's descriptor is edge-triggered)."""
        for _ in range(DRAIN_AT_MOST):
            try:
                raw = self._inbox.recv(zmq.NOBLOCK)
            except zmq.ZMQError:  # zmq.Again: that was all
                return
            self._take(raw)
        self._loop.call_soon(self.drain)

    def _take(self, raw: bytes) -> None:
        try:
            report = self._decoder.decode(raw)
        except Exception as error:  # whatever came, there are others behind it
            self._garbled.add(error, self._loop.time())
        else:
            self._callbacks.on_report(report)

    def _on_arrived(self, key: Key, pid: int) -> None:
        self._callbacks.on_arrived(*key, pid)

    def _on_exit(self, key: Key, detail: str, by_itself: bool) -> None:
        """What the process said before it went counts: the inbox comes first."""
        self.drain()
        held = self._outboxes.get(key[0])
        if held is not None and held[0] == key:
            self._outboxes.pop(key[0])[1].close(linger=0)
        self._callbacks.on_exit(*key, detail, by_itself)

    def _on_forkserver_gone(self) -> None:
        self._callbacks.on_forkserver_gone()


def _log_garbled(line: str, error: Exception) -> None:
    log.warning("%s", line)
