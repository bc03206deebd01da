"""Takes clients' connections, as long as descriptors are left for recovery.

Not asyncio's own loop for it: at the limit that logs a traceback for each place in the backlog, and
tries as many times again a second later. Here it pauses: clients wait in the kernel's queue, and
connections without a request under way make room, the oldest first.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Protocol, cast
from weakref import WeakKeyDictionary

from revivemoe.host.descriptors import lowest_free

log = logging.getLogger("revivemoe.server")

BACKLOG = 2048
AT_ONCE = 64
"""Connections taken before other work of the event loop gets its turn."""
LOOK_S = 0.05
"""How often it is seen whether there is room again."""
OF_ONE_CLIENT = (
    errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ENOPROTOOPT,
    errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
)  # fmt: skip
"""It was gone before it was taken: accept(2) wants the next one to be tried."""
IDLE_AT_LEAST_S = 1.0
"""A connection younger than this is not closed for room: its request may be on the way."""
SAY_EVERY_S = 30.0


class Connection(Protocol):
    """What is used of uvicorn's."""

    def shutdown(self) -> None:
        """Close it, now or once the answer under way is complete."""


class Acceptor:
    """Owns the watch on a listening socket, and stands where uvicorn has an `asyncio.Server`."""

    def __init__(
        self, listener: socket.socket, connection: Callable[[], asyncio.Protocol], below: int
    ) -> None:
        """`connection` makes a protocol. `below`: the numbers of descriptors that are clients'."""
        self._listener, self._connection, self._below = listener, connection, below
        self._since: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        """Connections that have not been asked to close, oldest first."""
        self._beginning: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        """While it is paused."""
        self._said_at: float | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def paused(self) -> bool:
        return self._look is not None

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Take no more. The socket stays its owner's."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if (full := self._full()) is not None:
                self._pause(full)
                return
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:  # none is left
                return
            except OSError as error:
                if error.errno not in OF_ONE_CLIENT:
                    self._pause(str(error))
                    return
            else:
                self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        task = self._loop.create_task(self._connect(client))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _connect(self, client: socket.socket) -> None:
        client.setblocking(False)
        _, protocol = await self._loop.connect_accepted_socket(self._connection, client)
        self._since[cast(Connection, protocol)] = self._loop.time()

    # ---- at the limit ------------------------------------------------------------------------

    def _pause(self, why: str) -> None:
        now = self._loop.time()
        if self._said_at is None or now >= self._said_at + SAY_EVERY_S:
            self._said_at = now
            log.warning("no new connections for now: %s", why)
        self._loop.remove_reader(self._listener)
        self._look = self._loop.call_later(LOOK_S, self._go_on)

    def _go_on(self) -> None:
        if self._full() is None:
            self._look = None
            self._loop.add_reader(self._listener, self._accept)
            return
        self._make_room()
        self._look = self._loop.call_later(LOOK_S, self._go_on)

    def _full(self) -> str | None:
        """Why another connection would be one too many: it gets the lowest number that is free."""
        try:
            if lowest_free() < self._below:
                return None
        except OSError as error:
            return str(error)
        return f"{self._below} descriptors are in use (ulimit -n); the rest is kept for recovery"

    def _make_room(self) -> None:
        """One that has a request under way is closed once that is answered."""
        until = self._loop.time() - IDLE_AT_LEAST_S
        old = [connection for connection, since in self._since.items() if since <= until]
        for connection in old[:AT_ONCE]:
            del self._since[connection]
            connection.shutdown()
