"""Cores that may be used: the least of what the affinity and the control groups' quotas allow."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from revivemoe.host.cgroups import Place, number, own_places, read


def usable_cores() -> int:
    """At least 1. A quota of 1.5 cores is 2: two threads can use it up, one cannot."""
    allowed = [len(os.sched_getaffinity(0)), *map(math.ceil, quotas(own_places("cpu")))]
    return max(1, min(allowed))


def quotas(places: Iterable[Place]) -> list[float]:
    """All quotas along the paths, in cores."""
    found = (_quota(group, place.version) for place in places for group in place.along())
    return [quota for quota in found if quota is not None]


def _quota(group: Path, version: int) -> float | None:
    if version == 2:
        quota, _, period = read(group / "cpu.max").partition(" ")
    else:
        quota, period = read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us")
    time_us, per_us = number(quota), number(period)
    return time_us / per_us if time_us and per_us else None
