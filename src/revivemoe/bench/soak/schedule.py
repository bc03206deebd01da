"""Which fault comes when, to whom: all kinds in a random order before any comes again."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from revivemoe.bench.soak.kinds import Kind, kinds
from revivemoe.bench.soak.layouts import Layout
from revivemoe.bench.soak.setup import Range


@dataclass(frozen=True)
class Fault:
    """One fault. Times in seconds."""

    kind: Kind
    ranks: tuple[int, ...]
    wait_s: float
    """From the moment all was well until it strikes."""
    delay_s: float = 0.0
    phase: str | None = None

    @property
    def name(self) -> str:
        where = f" in {self.phase}" if self.phase else ""
        whom = f" of rank {' and '.join(map(str, self.ranks))}" if self.kind.aimed else ""
        return f"{self.kind.name}{where}{whom}"


def schedule(draw: random.Random, layout: Layout, every_s: Range) -> Iterator[Fault]:
    """Without end."""
    while True:
        deck = kinds(layout)
        draw.shuffle(deck)
        for kind in deck:
            yield _fault(draw, layout, kind, every_s)


def _fault(draw: random.Random, layout: Layout, kind: Kind, every_s: Range) -> Fault:
    phase = draw.choice(kind.phases) if kind.phases else None
    ranks = _ranks(draw, layout, kind, phase)
    return Fault(kind, ranks, draw.uniform(*every_s), draw.uniform(0, kind.within_s), phase)


def _ranks(draw: random.Random, layout: Layout, kind: Kind, phase: str | None) -> tuple[int, ...]:
    """Ranks that can be struck so, never all that have a role (unless all are meant)."""
    if kind.how == "all":
        return tuple(layout.ranks)
    if kind.how == "switch":  # whose role it is to take is lost first
        return draw.choice(layout.attention_ranks), draw.choice(layout.expert_ranks)
    able: Sequence[int] = layout.ranks
    if kind.what == "nan":
        able = layout.expert_ranks if phase == "experts" else layout.attention_ranks
    while True:
        chosen = tuple(draw.sample(able, kind.ranks))
        left = set(layout.ranks) - set(chosen)
        if left & set(layout.attention_ranks) and left & set(layout.expert_ranks):
            return chosen
