"""A stream's way into the engine: its headers need not wait for it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from revivemoe.server.errors import of_engine
from revivemoe.server.reply import Reply
from revivemoe.streams import EngineUnavailable

HEADERS_WITHIN_S = 0.5
"""For a request to be admitted, and so to know its first header, before the headers go out."""


class Admission:
    """Asks once. The answer may come before the headers are sent, or within the stream."""

    def __init__(self, submit: Callable[[], Awaitable[Reply]]) -> None:
        self._task = asyncio.ensure_future(submit())

    async def settle(self, within_s: float) -> None:
        """Wait for the answer, not for long. Raises what refused the request by then."""
        await asyncio.wait({self._task}, timeout=within_s)
        if self._task.done():
            self._task.result()

    @property
    def headers(self) -> dict[str, str]:
        """Those of the reply, as far as they are known."""
        return self._task.result().headers if self._task.done() else {}

    async def events(self) -> AsyncGenerator[str, None]:
        """Those of the reply. Raises ApiError."""
        try:
            reply = await self._task
        except EngineUnavailable as error:
            raise of_engine(error) from error
        async with aclosing(reply.events()) as events:
            async for event in events:
                yield event

    def close(self) -> None:
        """Nobody waits any longer. Idempotent."""
        if self._task.cancel():
            self._task.add_done_callback(_close_reply)  # if it comes all the same
        else:
            _close_reply(self._task)


def _close_reply(task: asyncio.Future[Reply]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
