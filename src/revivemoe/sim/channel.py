"""A message channel: first-in first-out, each message with a delay of its own."""

import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Generic, TypeVar

from revivemoe.sim.clock import Clock

T = TypeVar("T")


class Channel(Generic[T]):
    """One direction between the engine and one rank process."""

    def __init__(
        self, clock: Clock, rng: Random, max_delay_s: float, deliver: Callable[[T], None]
    ) -> None:
        self._clock, self._rng, self._max_delay_s = clock, rng, max_delay_s
        self._deliver = deliver
        self._last = 0.0
        self._lost_after = math.inf

    def send(self, message: T) -> None:
        due = self._clock.now + self._rng.random() * self._max_delay_s
        self._last = max(self._last, due)
        self._clock.at(self._last, partial(self._arrive, message))

    def lose_rest(self) -> None:
        """Its sender has died: what still lay in its buffers does not arrive."""
        self._lost_after = self._clock.now + self._rng.random() * self._max_delay_s

    def _arrive(self, message: T) -> None:
        if self._clock.now <= self._lost_after:
            self._deliver(message)
