"""What processes use, and whether that has grown. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

SHARE = 5
"""Begin and end are the first and the last of so many parts of a soak."""
FEWEST = 3
"""Samples for a median that says something."""


@dataclass(frozen=True)
class Usage:
    """Of one process, or the sum or median over several."""

    rss_mb: float
    shared_mb: float
    """Of it: shared memory (memfd)."""
    descriptors: float
    threads: float


Sample = Mapping[str, Usage]
"""By role, at one moment."""


@dataclass(frozen=True)
class Bound:
    """Growth of more than both is a leak."""

    amount: float
    share: float


BOUNDS = {
    "rss_mb": Bound(30, 0.2),
    "shared_mb": Bound(30, 0.2),
    "descriptors": Bound(10, 0),
    "threads": Bound(5, 0),
}


def summed(usages: Sequence[Usage]) -> Usage:
    return Usage(*(sum(getattr(u, f.name) for u in usages) for f in fields(Usage)))


def median(usages: Sequence[Usage]) -> Usage:
    return Usage(*(statistics.median(getattr(u, f.name) for u in usages) for f in fields(Usage)))


def begin_and_end(samples: Sequence[Sample]) -> tuple[Sample, Sample]:
    """Medians by role over the first and over the last samples; nothing if there are too few."""
    count = len(samples) // SHARE
    if count < FEWEST:
        return {}, {}
    return _medians(samples[:count]), _medians(samples[-count:])


def _medians(samples: Sequence[Sample]) -> Sample:
    return {role: median([sample[role] for sample in samples]) for role in samples[0]}


def growths(begin: Sample, end: Sample) -> list[str]:
    """What has grown by more than its bound."""
    found = []
    for role, before in begin.items():
        for name, bound in BOUNDS.items():
            was, now = getattr(before, name), getattr(end[role], name)
            if now - was > bound.amount and now - was > bound.share * was:
                found.append(f"{name} of {role} grew from {was:.0f} to {now:.0f}")
    return found
