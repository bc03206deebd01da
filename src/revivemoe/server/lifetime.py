"""When the server stops: first no new work, then the streams that are still open are cut."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from revivemoe.server.errors import shutting_down

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class Lifetime:
    """`draining`: no new work, and endless streams end. `cut`: every open response ends now, by an
    error.
    """

    def __init__(self, cut: asyncio.Event | None = None) -> None:
        self.draining = asyncio.Event()
        self.cut = cut or asyncio.Event()
        self._open = 0
        self._all_done = asyncio.Event()
        self._all_done.set()

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return self._open

    def check_open(self) -> None:
        """Raises ApiError once the server has been asked to stop."""
        if self.draining.is_set():
            raise shutting_down()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A request, from its head to the last byte of its answer. One that comes when the server
        has been asked to stop is refused at once and holds up nobody.
        """
        if self.draining.is_set():
            yield
            return
        self._open += 1
        self._all_done.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._all_done.set()

    async def wait_done(self, within_s: float) -> None:
        """Until no request is under way, for so long at most, or until all are cut."""
        done, cut = (
            asyncio.ensure_future(self._all_done.wait()),
            asyncio.ensure_future(self.cut.wait()),
        )
        try:
            await asyncio.wait({done, cut}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(done, cut)

    async def before_the_cut(self, work: Awaitable[T]) -> T:
        """`work`'s result. Raises ApiError when the server stops."""
        task, cut = asyncio.ensure_future(work), asyncio.ensure_future(self.cut.wait())
        try:
            await asyncio.wait({task, cut}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise shutting_down()
        finally:
            await cancel_all(task, cut)

    async def run(self, receive: Receive, work: Awaitable[T]) -> T:
        """`work`'s result. It is cancelled, and its cleaning up awaited, when nobody waits for it.

        Raises ClientGone when the client disconnects, ApiError when the server stops.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        cut = asyncio.ensure_future(self.cut.wait())
        try:
            await asyncio.wait({task, gone, cut}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise shutting_down()
        finally:
            await cancel_all(task, gone, cut)


class UnderWay:
    """Counts every request, whatever it is about: also while its body comes or is tokenised."""

    def __init__(self, app: ASGIApp, lifetime: Lifetime) -> None:
        self._app, self._lifetime = app, lifetime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lifetime.under_way():
            await self._app(scope, receive, send)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
