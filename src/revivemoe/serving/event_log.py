"""What happened lately: kept once, for any number of readers."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from revivemoe.streams import Document, FellBehind

KEPT = 10_000
"""A reader that is further behind has lost events, and is told so."""
TOLD_AT_FIRST = 1000


class EventLog:
    """A reader has a place in the log and no queue of its own: one that stalls costs nothing."""

    def __init__(self) -> None:
        self._events: deque[Document] = deque(maxlen=KEPT)
        self._num_events = 0
        """Ever; the last one that is kept has this number."""
        self._next = asyncio.Event()

    def add(self, event: Document) -> None:
        self._events.append(event)
        self._num_events += 1
        self._next.set()
        self._next = asyncio.Event()

    async def follow(self) -> AsyncIterator[Document]:
        """The last events, and then each as it happens. Raises FellBehind."""
        told = max(0, self._num_events - TOLD_AT_FIRST)
        while True:
            behind = self._num_events - told
            if behind > len(self._events):
                raise FellBehind(f"{behind - len(self._events)} events were not read in time")
            if behind:
                yield self._events[-behind]
                told += 1
            else:
                await self._next.wait()
