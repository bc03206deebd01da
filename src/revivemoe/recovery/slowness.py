"""Which ranks are slow: own work without waits, per phase and number of rows, against peers.

Rows are compared in classes of powers of two, because a call has fixed costs: four rows do not
take twice as long as two. A rank without peers to compare with is held against its own best.
"""

from bisect import bisect_left
from statistics import median

from revivemoe.ids import RankId
from revivemoe.messages.reports import Pace
from revivemoe.recovery.policy import Policy

MIN_CALLS = 16
"""Calls of a class before its average counts."""
STALE_AFTER = 3
"""Reports in a row without a call of a class, after which it does not count any more."""
JUDGE_EVERY_S = 1.0
Key = tuple[str, int]


class Slowness:
    """Keeps the ranks' paces. Pure; times are passed in."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._paces: dict[RankId, dict[Key, Pace]] = {}
        self._best: dict[RankId, dict[Key, float]] = {}
        self._idle: dict[RankId, dict[Key, int]] = {}
        """For how many reports in a row each class has had no call."""
        self._since: dict[RankId, float] = {}
        """Since when each rank has been at or above the factor."""
        self._judged_at = float("-inf")
        self._found: dict[RankId, float] = {}

    def heard(self, rank: RankId, paces: list[Pace]) -> None:
        """A rank's present averages."""
        known = self._paces.setdefault(rank, {})
        best = self._best.setdefault(rank, {})
        idle = self._idle.setdefault(rank, {})
        for pace in paces:
            key = (pace.phase, pace.size)
            same = key in known and known[key].count == pace.count
            idle[key] = idle.get(key, 0) + 1 if same else 0
            known[key] = pace
            if pace.count >= MIN_CALLS:
                best[key] = min(pace.seconds, best.get(key, pace.seconds))

    def forget(self, rank: RankId) -> None:
        """The rank is out, or has a new process."""
        self._paces.pop(rank, None)
        self._best.pop(rank, None)
        self._idle.pop(rank, None)
        self._since.pop(rank, None)
        self._found.pop(rank, None)

    def judge(self, now: float) -> dict[RankId, float]:
        """The ranks that have been slow for long enough, and how slow. Looked at once a second."""
        if now - self._judged_at < JUDGE_EVERY_S:
            return self._found
        self._judged_at, self._found = now, {}
        for rank, ratio in self.ratios().items():
            if ratio < self._policy.slow_factor:
                self._since.pop(rank, None)
            elif now - self._since.setdefault(rank, now) >= self._policy.slow_after_s:
                self._found[rank] = ratio
        return self._found

    def ratios(self) -> dict[RankId, float]:
        """How many times longer each rank takes than its peers, where there is a telling.

        O(N K log N) for N ranks and K classes of work.
        """
        of_class: dict[Key, list[float]] = {}
        for paces in self._paces.values():
            for key, pace in paces.items():
                if pace.count >= MIN_CALLS:
                    of_class.setdefault(key, []).append(pace.seconds)
        for seconds in of_class.values():
            seconds.sort()
        found = {}
        for rank in sorted(self._paces):
            own = {k: p.seconds for k, p in self._present(rank).items() if p.count >= MIN_CALLS}
            usual = {k: self._usual(rank, k, s, of_class[k]) for k, s in own.items()}
            if ratios := [own[key] / usual_s for key, usual_s in usual.items() if usual_s]:
                found[rank] = median(ratios)
        for rank in self._since.keys() - found.keys():
            del self._since[rank]
        return found

    def _present(self, rank: RankId) -> dict[Key, Pace]:
        """What a rank does now: averages of work that it does no more say nothing of it. All, of a
        rank that does nothing.
        """
        paces, idle = self._paces[rank], self._idle[rank]
        return {k: p for k, p in paces.items() if idle[k] < STALE_AFTER} or paces

    def _usual(self, rank: RankId, key: Key, own_s: float, sorted_s: list[float]) -> float | None:
        """What a class takes the peers; without peers, what it took this rank at best."""
        num_peers = len(sorted_s) - 1
        if not num_peers:
            return self._best.get(rank, {}).get(key)
        at, half = bisect_left(sorted_s, own_s), num_peers // 2

        def peer(k: int) -> float:
            return sorted_s[k if k < at else k + 1]

        return peer(half) if num_peers % 2 else (peer(half - 1) + peer(half)) / 2
