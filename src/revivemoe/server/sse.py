"""Server-sent events: a response that ends with its client, and never without a last word."""

import json
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from revivemoe.server.errors import ApiError, describe, internal_error
from revivemoe.server.lifetime import ClientGone, Lifetime

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


def dumps(document: object) -> str:
    """Compact and ASCII: U+2028 and the like would end a line for some readers of events."""
    return json.dumps(document, separators=(",", ":"))


def event(document: object) -> str:
    return f"data: {dumps(document)}\n\n"


def error_event(error: ApiError) -> str:
    return f"event: error\n{event(error.document())}"


class EventStream(Response):
    """Sends the strings of `events` until they end, the client goes away or the server is cut.

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
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", **(headers or {})})
        self._events = events
        self._lifetime = lifetime
        self._on_close = on_close
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._respond(receive, send)
        finally:
            self._on_close()
            await self._events.aclose()

    async def _respond(self, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._lifetime.run(receive, self._write_all(send))
        except ClientGone:
            return
        except ApiError as error:
            await _write(send, error_event(error))
        except Exception as error:
            logger.error("stream: %s", describe(error))
            await _write(send, error_event(internal_error()))
        await _write(send, self._last, more=False)

    async def _write_all(self, send: Send) -> None:
        async for text in self._events:
            await _write(send, text)


async def _write(send: Send, text: str, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
