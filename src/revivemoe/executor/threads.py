"""How many threads a rank computes with: one less while others want the processor, too.

A parallel region ends with its last thread. Where one of two stands in the kernel's queue behind
somebody else's, the other spins, and a step takes many times as long as one thread alone would
take. That they stand there the kernel tells, in nanoseconds for each thread.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

LOOK_EVERY_S = 0.1
CROWDED = 0.15
"""Seconds in the queue, of two threads, for each second: from so many on there are too many."""
TRY_AGAIN_S, TRY_AGAIN_AT_MOST_S = 1.0, 30.0
"""With all of them; longer each time that it was in vain."""
TASKS = Path("/proc/self/task")


def queued_s() -> dict[str, float]:
    """Seconds that each thread of this process wanted a processor and had none. Without those of
    which the kernel does not tell; of none while there is no descriptor to ask with.
    """
    found = {}
    with suppress(OSError):
        for task in TASKS.iterdir():
            with suppress(OSError, IndexError):  # it has ended, or the kernel was built without
                found[task.name] = int((task / "schedstat").read_bytes().split()[1]) / 1e9
    return found


class Threads:
    """Of one rank. Our kernels give the same bits with any number; torch's may round otherwise."""

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        queued: Callable[[], Mapping[str, float]] = queued_s,
        use: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.count = self._most = most
        self._clock, self._queued, self._use = clock, queued, use
        self._looked_at, self._before = clock(), queued() if most > 1 else {}
        self._try_at, self._pause_s = 0.0, TRY_AGAIN_S

    def look(self) -> None:
        """After each step. Almost always it does nothing."""
        if self._most == 1 or (now := self._clock()) - self._looked_at < LOOK_EVERY_S:
            return
        share = self._share(now)
        crowded = share > CROWDED * max(1.0, self.count / 2)
        if crowded and self.count > 1:
            if self.count == self._most:  # else it is the same crowd
                self._try_at = now + self._pause_s
                self._pause_s = min(2 * self._pause_s, TRY_AGAIN_AT_MOST_S)
            self._set(self.count - 1)
        elif not crowded and self.count < self._most and now >= self._try_at:
            self._set(self._most)
        elif self.count == self._most and now > self._try_at + self._pause_s:
            self._pause_s = TRY_AGAIN_S

    def _share(self, now: float) -> float:
        """Seconds in the queue since the last look, for each second: of threads that were there."""
        before, after = self._before, self._queued()
        waited = sum(after[task] - before[task] for task in after.keys() & before.keys())
        share = waited / (now - self._looked_at)
        self._looked_at, self._before = now, after
        return share

    def _set(self, count: int) -> None:
        self.count = count
        self._use(count)
