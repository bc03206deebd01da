"""The first epoch: all ranks load, then they meet. Whatever goes wrong before that ends it."""

from collections.abc import Iterable

from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import RankId
from revivemoe.recovery.faults import Fault

LAST_WORDS_S = 0.5
"""How long the last words of a rank that ended while starting may take to arrive."""


class StartUp:
    """From the first launch to the first agreement of all. Times are passed in."""

    def __init__(self, fleet: Fleet, members: Iterable[RankId], timeout_s: float) -> None:
        self._fleet, self._timeout_s = fleet, timeout_s
        self._deadline = float("inf")
        self._unmet = set(members)
        """Members that have not met the others yet."""
        self.exited: Fault | None = None
        """The first rank whose process has ended. Why, its last words may say."""
        self._exited_at = 0.0

    def begin(self, now: float) -> None:
        """Launch every rank."""
        assert self._deadline == float("inf"), "started twice"
        self._deadline = now + self._timeout_s
        for rank in sorted(self._unmet):
            self._fleet.lives.launch(rank, now)

    @property
    def loaded(self) -> bool:
        """Whether all can meet."""
        return all(view.ready for view in self._fleet.views.values())

    def met(self, rank: RankId) -> bool:
        """A rank has met the others. Returns whether all have."""
        self._unmet.discard(rank)
        return not self._unmet

    def exit_of(self, view: RankView, fault: Fault, now: float) -> None:
        """A process has ended."""
        view.fault = fault
        if self.exited is None:
            self.exited, self._exited_at = fault, now

    def failure(self, now: float) -> str | None:
        """Why the start is at its end; None while it is not."""
        views = self._fleet.views.values()
        if now > self._deadline:
            slow = sorted(view.rank for view in views if not view.ready)
            late = f"{slow} did not start" if slow else f"{sorted(self._unmet)} did not meet"
            return f"ranks {late} within {self._timeout_s:.0f} s"
        ended = [view for view in views if view.fault is not None]
        said = next((view for view in ended if view.last_words), None)
        if said is None and self.exited is not None and now - self._exited_at > LAST_WORDS_S:
            said = self._fleet.views[self.exited.rank]
        if said is None or said.fault is None:
            return None
        return f"rank {said.rank} ended while starting: {said.last_words or said.fault.detail}"
