"""Virtual time: a heap of what is to happen when."""

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]


class Clock:
    """Time moves only from one action to the next. Equal times: in the order of the asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_actions = 0
        self._heap: list[tuple[float, int, Action]] = []

    def at(self, when: float, action: Action) -> None:
        """Do it then; at once if that is past."""
        heappush(self._heap, (max(when, self.now), self.num_actions, action))
        self.num_actions += 1

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now + delay_s, action)

    def step(self) -> None:
        """Go to the next action and do it."""
        self.now, _, action = heappop(self._heap)
        action()
