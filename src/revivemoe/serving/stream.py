"""Events of one submission, from the engine's callback to one async reader."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from revivemoe.streams import StreamEvent


class QueueStream:
    """A `Sink` on one side, a `Stream` on the other."""

    def __init__(self, degraded: bool) -> None:
        self.degraded_from_start = degraded
        self.abort: Callable[[], None] = lambda: None
        """Called when the reader goes away before the end."""
        self._events: deque[StreamEvent] = deque()
        self._ended = False
        self._arrived = asyncio.Event()

    def push(self, event: StreamEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def close(self) -> None:
        if not self._ended:
            self.abort()
