"""Counters since the start, for the metrics."""

from collections import Counter, deque
from dataclasses import dataclass, field

from revivemoe.engine.requests import Arrival


@dataclass
class Totals:
    generation_tokens: int = 0
    prompt_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    migrated: int = 0
    recomputed_tokens: int = 0
    convicted: int = 0
    """Requests ended because they brought ranks down."""
    mended: int = 0
    """Sequences that a serving rank had lost, or that had lost their last token on the way."""
    internal_errors: Counter[str] = field(default_factory=Counter)
    """Exceptions that were contained, by what was taken in."""
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    def count_tokens(self, arrival: Arrival, step_s: float) -> None:
        self.generation_tokens += arrival.new_tokens
        self.step_s.append(step_s)
        for reason in arrival.finished:
            self.finished[reason] = self.finished.get(reason, 0) + 1
