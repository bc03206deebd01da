"""Server-sent events: a response that ends with its client, and never without a last word."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from revivemoe.server.errors import ApiError, describe, dumps, internal_error
from revivemoe.server.lifetime import ClientGone, Lifetime, cancel_all

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"
KEEP_ALIVE_S = 10.0
"""Proxies cut a connection that is silent for a minute, some sooner."""
KEEP_ALIVE = ": keep-alive\n\n"
STALLED_S = 300.0
"""A client that has taken nothing for so long, though there is something to take, is given up."""


def event(document: object) -> str:
    return f"data: {dumps(document)}\n\n"


def error_event(error: ApiError) -> str:
    return f"event: error\n{event(error.document())}"


class EventStream(Response):
    """Sends the strings of `events` until they end, the client goes away or the server is cut;
    and a comment whenever there is nothing to send for a while, so that proxies keep the line.

    An ApiError raised by `events` becomes an `error` event. `on_close` runs however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        lifetime: Lifetime,
        on_close: Callable[[], None] = lambda: None,
        headers: dict[str, str] | None = None,
        last: str = DONE,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.status_code = 200
        self.background = None
        fixed = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers({**fixed, **(headers or {})})
        self._keep_alive_s = keep_alive_s
        self._events = events
        self._lifetime = lifetime
        self._on_close = on_close
        self._last = last
        self._wrote = 0.0
        """When something was last sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._respond(receive, send)
        except ClientGone:
            pass
        finally:
            self._on_close()
            await self._events.aclose()

    async def _respond(self, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._lifetime.run(receive, self._write_all(send))
        except ClientGone:
            raise
        except ApiError as error:
            await _write(send, error_event(error))
        except Exception as error:
            logger.error("stream: %s", describe(error))
            await _write(send, error_event(internal_error()))
        await _write(send, self._last, more=False)

    async def _write_all(self, send: Send) -> None:
        self._wrote = time.monotonic()
        keeping = asyncio.ensure_future(self._keep_alive(send))
        try:
            async for text in self._events:
                self._wrote = time.monotonic()
                await _write(send, text)
        finally:
            await cancel_all(keeping)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            left_s = self._wrote + self._keep_alive_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                self._wrote = time.monotonic()
                await send(_chunk(KEEP_ALIVE))


async def _write(send: Send, text: str, more: bool = True) -> None:
    """Raises ClientGone for a client that takes nothing."""
    try:
        async with asyncio.timeout(STALLED_S):
            await send(_chunk(text, more))
    except TimeoutError:
        logger.warning("stream: its client has read nothing for %g s and is given up", STALLED_S)
        raise ClientGone from None


def _chunk(text: str, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
