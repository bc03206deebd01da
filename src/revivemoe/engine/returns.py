"""Lost ranks come back by themselves, to the roles they had, and missing experts with them.

    lost --> queued (back-off) --> its process loads --> taken in --> who stood in for it goes home

Not on a device that is bad, nor where an operator took the rank out.
"""

import logging
from collections import Counter
from random import Random

from revivemoe.engine.drains import Drains
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.rank_life import Gone, Member
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.events import RejoinGivenUp, RejoinQueued, Tell
from revivemoe.recovery.faults import Fault

log = logging.getLogger("revivemoe.engine")


class Returns:
    """Decides when a lost rank is started again."""

    def __init__(self, epochs: Epochs, drains: Drains, tell: Tell) -> None:
        self._epochs, self._fleet, self._drains, self._tell = epochs, epochs.fleet, drains, tell
        self._policy = epochs.policy
        self._attempts: Counter[RankId] = Counter()
        """Starts in a row after which the rank did not stay."""
        self._given_up: set[RankId] = set()
        self._looked_at = Epoch(-1)
        """The epoch in which the rest was seen to."""
        self._tried: object = None
        """Members and missing experts when these were last to be loaded: not twice the same."""

    def asked(self, rank: RankId) -> None:
        """An operator wants it back: what failed before is forgotten."""
        self._attempts.pop(rank, None)
        self._given_up.discard(rank)

    def tick(self, now: float) -> None:
        """Queue those that are lost."""
        for view in self._fleet.views.values():
            match view.life:
                case Member(since=since) if now - since >= self._policy.settled_after_s:
                    self.asked(view.rank)
                case _ if self.wants(view):
                    self._queue(view, now)

    def wants(self, view: RankView) -> bool:
        """Whether this rank is to be started again, and is not yet on its way."""
        return (
            isinstance(view.life, Gone)
            and self._policy.auto_rejoin
            and not self._epochs.stopping
            and self._fleet.trusted(view)
            and view.rank not in self._given_up
        )

    def _queue(self, view: RankView, now: float) -> None:
        rank, attempt = view.rank, self._attempts[view.rank]
        if attempt >= self._policy.max_rejoins:
            self._given_up.add(rank)
            self._tell(RejoinGivenUp(rank, attempt))
            log.warning("rank %d did not stay %d times in a row: rejoin it by hand", rank, attempt)
            return
        if view.fault is not None and view.fault.kind == "going_home":
            self._fleet.lives.queue(rank, now, now)  # nothing has failed
            return
        self._attempts[rank] += 1
        longest, first = self._policy.rejoin_at_most_s, self._policy.rejoin_after_s
        jitter = Random(f"{rank} {view.incarnation}").uniform(0.75, 1.25)
        delay_s = min(longest, first * 2.0 ** min(attempt, 64)) * jitter
        self._fleet.lives.queue(rank, now + delay_s, now)
        self._tell(RejoinQueued(rank, attempt + 1, delay_s))

    def see_to_the_rest(self, now: float) -> None:
        """Once in an epoch, while it is quiet: stand-ins go home, what is missing is loaded."""
        present, fleet = self._epochs.membership, self._fleet
        if not self._policy.auto_rejoin or self._looked_at == present.epoch or fleet.launching:
            return
        if present.missing:
            self._load_missing(now)
            return
        self._looked_at = present.epoch
        home = self._epochs.home.experts
        if all(fleet.views[rank].member and rank in present.experts for rank in home):
            for rank in fleet.switched:
                self._send_home(rank)

    def _load_missing(self, now: float) -> None:
        loads, present = self._epochs.loads, self._epochs.membership
        this = (present.members, present.missing, loads.refusing(now))
        may = "reload" in self._policy.repair and self._epochs.attempts.can_load(now)
        if loads.loading or loads.awaits_epoch or not may or this == self._tried:
            return
        self._tried = this
        try:
            loads.restore(present, now)
        except ValueError as reason:  # nothing that could be done: a rank that comes back may
            log.info("experts stay missing: %s", reason)

    def _send_home(self, rank: RankId) -> None:
        """A rank that has become an expert rank is not needed as one any more."""
        if self._fleet.views[rank].member:
            detail = "all expert ranks of the start are back: it returns to its own role"
            self._drains.ask(Fault(rank, "going_home", detail), None)
