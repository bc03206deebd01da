"""When the server stops: first no new work, then the streams that are still open are cut."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from revivemoe.server.errors import ApiError

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class Lifetime:
    """`draining`: endless streams end. `cut`: every open response ends now, with an error."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.cut = asyncio.Event()

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
            raise ApiError("the server is shutting down", 503, code="shutting_down")
        finally:
            await cancel_all(task, gone, cut)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
