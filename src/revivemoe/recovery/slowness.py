"""Which ranks are slow: own work without waits, per phase and number of rows, against peers.

Rows are compared in classes of powers of two, because a call has fixed costs: four rows do not
take twice as long as two. A rank without peers to compare with is held against its own best.
"""

from statistics import median

from revivemoe.ids import RankId
from revivemoe.messages.reports import Pace
from revivemoe.recovery.policy import Policy

MIN_CALLS = 16
"""Calls of a class before its average counts."""
Key = tuple[str, int]


class Slowness:
    """Keeps the ranks' paces. Pure; times are passed in."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._paces: dict[RankId, dict[Key, Pace]] = {}
        self._best: dict[RankId, dict[Key, float]] = {}
        self._since: dict[RankId, float] = {}
        """Since when each rank has been at or above the factor."""

    def heard(self, rank: RankId, paces: list[Pace]) -> None:
        """A rank's present averages."""
        known = self._paces.setdefault(rank, {})
        best = self._best.setdefault(rank, {})
        for pace in paces:
            key = (pace.phase, pace.size)
            known[key] = pace
            if pace.count >= MIN_CALLS:
                best[key] = min(pace.seconds, best.get(key, pace.seconds))

    def forget(self, rank: RankId) -> None:
        """The rank is out, or has a new process."""
        self._paces.pop(rank, None)
        self._best.pop(rank, None)
        self._since.pop(rank, None)

    def ratio(self, rank: RankId) -> float | None:
        """How many times longer this rank takes than its peers; None if there is no telling."""
        ratios = []
        for key, pace in self._paces.get(rank, {}).items():
            if pace.count >= MIN_CALLS and (usual := self._usual(rank, key)) is not None:
                ratios.append(pace.seconds / usual)
        return median(ratios) if ratios else None

    def _usual(self, rank: RankId, key: Key) -> float | None:
        peers = [
            paces[key].seconds
            for peer, paces in self._paces.items()
            if peer != rank and key in paces and paces[key].count >= MIN_CALLS
        ]
        usual = median(peers) if peers else self._best.get(rank, {}).get(key)
        return usual if usual else None

    def judge(self, now: float) -> dict[RankId, float]:
        """The ranks that have been slow for long enough, and how slow."""
        found = {}
        for rank in sorted(self._paces):
            ratio = self.ratio(rank)
            if ratio is None or ratio < self._policy.slow_factor:
                self._since.pop(rank, None)
            elif now - self._since.setdefault(rank, now) >= self._policy.slow_after_s:
                found[rank] = ratio
        return found
