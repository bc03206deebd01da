"""Links between two ranks that fail, once or more."""

from collections import Counter
from dataclasses import dataclass
from random import Random

from revivemoe.ids import Epoch, RankId
from revivemoe.sim.process import Process

MOST_EXCHANGES = 12
"""A link that is to fail does so within so many exchanges of an epoch."""


@dataclass
class Cut:
    ends: frozenset[RankId]
    times_left: int
    """In so many further epochs."""
    exchanges_left: int
    epoch: Epoch | None = None
    """The last epoch it failed in."""


class Links:
    def __init__(self, rng: Random) -> None:
        self._cuts: list[Cut] = []
        self._failures: Counter[frozenset[RankId]] = Counter()
        self._rng = rng

    def cut(self, one: RankId, other: RankId, times: int) -> None:
        """The link fails soon; if `times` is 2, in the next epoch as well."""
        self._cuts.append(Cut(frozenset({one, other}), times, 0))

    def suspects(self) -> list[frozenset[RankId]]:
        """Links that have failed more than once: one end of each may be accused."""
        return [ends for ends, failures in self._failures.items() if failures > 1]

    def failed(self, process: Process) -> bool:
        """Whether the exchange that this process is about to take part in fails under it."""
        domain = process.domain
        if domain is None:
            return False
        return any(self._fails(c, process.rank, domain.epoch, domain.members) for c in self._cuts)

    def _fails(self, cut: Cut, rank: RankId, epoch: Epoch, members: tuple[RankId, ...]) -> bool:
        if rank not in cut.ends or not cut.ends <= set(members):
            return False
        if cut.epoch == epoch:
            return True
        if not cut.times_left:
            return False
        cut.exchanges_left -= 1
        if cut.exchanges_left > 0:
            return False
        cut.epoch, cut.times_left = epoch, cut.times_left - 1
        cut.exchanges_left = self._rng.randint(1, MOST_EXCHANGES)
        self._failures[cut.ends] += 1
        return True
