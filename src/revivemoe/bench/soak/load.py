"""Streams that never end: as soon as one is finished, the next begins. Each is checked."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

from revivemoe.bench.loadgen import Body, StreamResult, stream_completion
from revivemoe.bench.soak.violations import Violations

SILENT_FOR_S = 60.0
LOOKS_EVERY_S = 1.0


@dataclass(frozen=True)
class Request:
    """A completion, and the tokens that it must yield."""

    body: Body
    expected: list[int]


@dataclass
class Tally:
    """Of all streams."""

    done: int = 0
    failed: int = 0
    wrong: int = 0
    tokens: int = 0
    worst_gap_s: float = 0.0
    """Between two tokens of a stream, or before its first."""


class Load:
    """So many streams at once, over the same requests again and again."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        requests: Sequence[Request],
        streams: int,
        violations: Violations,
    ) -> None:
        self.tally = Tally()
        self._client, self._violations = client, violations
        self._next = enumerate(itertools.cycle(requests))
        self._open: dict[int, StreamResult] = {}
        self._told: set[int] = set()
        """Streams whose silence was told of."""
        self._ending = False
        self._workers = [asyncio.create_task(self._work()) for _ in range(streams)]
        self._watcher = asyncio.create_task(self._watch())

    async def end(self) -> None:
        """Let the open streams come to their ends; those that do not have failed."""
        self._ending = True
        ended, hanging = await asyncio.wait(self._workers, timeout=2 * SILENT_FOR_S)
        for worker in ended:
            worker.result()  # a mistake of our own, if it has raised
        self.tally.failed += len(hanging)
        if hanging:
            self._violations.add(f"{len(hanging)} streams did not end")
        await self.cancel()

    async def cancel(self) -> None:
        tasks = [*self._workers, self._watcher]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while not self._ending:
            number, request = next(self._next)
            result = self._open[number] = StreamResult()
            try:
                await stream_completion(self._client, request.body, result)
            except httpx.HTTPError as error:
                result.error = f"{type(error).__name__} {error}"
            finally:
                del self._open[number]
            self._take(number, request, result)

    def _take(self, number: int, request: Request, result: StreamResult) -> None:
        tally = self.tally
        tally.done += 1
        tally.tokens += len(result.token_ids)
        tally.worst_gap_s = max(tally.worst_gap_s, longest_silence_s(result))
        if result.error is not None:
            tally.failed += 1
            self._violations.add(f"stream {number} failed: {result.error}")
        elif wrong := difference(request.expected, result):
            tally.wrong += 1
            self._violations.add(f"stream {number} is wrong: {wrong}")

    async def _watch(self) -> None:
        while True:
            now = time.monotonic()
            for number, result in self._open.items():
                since = result.times[-1] if result.times else result.started
                if now - since > SILENT_FOR_S and number not in self._told:
                    self._told.add(number)
                    self._violations.add(f"stream {number} is silent for {SILENT_FOR_S:.0f} s")
            await asyncio.sleep(LOOKS_EVERY_S)


def longest_silence_s(result: StreamResult) -> float:
    times = [result.started, *result.times]
    return max((b - a for a, b in pairwise(times)), default=0.0)


def difference(expected: Sequence[int], result: StreamResult) -> str:
    """Where a stream departs from what it must yield; "" if nowhere."""
    got = result.token_ids
    if got == list(expected):
        return "" if result.finish_reason == "length" else f"it ended by {result.finish_reason}"
    pairs = enumerate(zip(expected, got, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(got)))
    return (
        f"from token {at} on, of {len(got)}: {got[at : at + 4]}, not {expected[at : at + 4]} "
        f"({result.request_id}, quality {result.quality})"
    )
