"""Experts loaded beside the steps: what is under way, what lies ready for the next epoch."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from revivemoe.epochs.obligations import Obligation, Obligations
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, ExpertPlacement, Reload
from revivemoe.messages.commands import Command, LoadExperts, SlotLoad
from revivemoe.messages.events import LoadedBeside, Tell
from revivemoe.messages.reports import ExpertsLoaded
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repair import assign_reloads, assign_replicas

log = logging.getLogger("revivemoe.epochs")


LOAD = "load"
"""An obligation: experts loaded beside the steps."""


@dataclass(frozen=True)
class Loading:
    """Experts being loaded by one rank."""

    rank: RankId
    reloads: tuple[Reload, ...]


class Loads:
    """Sends ranks to load, and keeps what they have loaded until a map names it."""

    def __init__(
        self,
        send: Callable[[RankId, Command], None],
        obligations: Obligations,
        policy: Policy,
        tell: Tell,
    ) -> None:
        self._send, self._tell = send, tell
        self._obligations, self._policy = obligations, policy
        self._under_way: dict[int, Loading] = {}
        self._refused: dict[RankId, float] = {}
        """Whose process could not load, or does not answer, since when: not asked again soon."""
        self.loaded: tuple[Reload, ...] = ()
        """In their slots, but not in the map yet."""
        self._next_request = 0
        self._at_boundary = False
        """Some missing experts only fit into slots that are in use: load them at a boundary."""

    @property
    def loading(self) -> tuple[Reload, ...]:
        """Under way."""
        return tuple(x for loading in self._under_way.values() for x in loading.reloads)

    @property
    def awaits_epoch(self) -> bool:
        """Whether a new epoch would take something into use, and nothing more is under way."""
        return bool(self.loaded or self._at_boundary) and not self._under_way

    def begin(self, reloads: Iterable[Reload], now: float) -> None:
        """Let the ranks load these into slots that the present epoch does not use."""
        refusing = self.refusing(now)
        reloads = tuple(r for r in reloads if r.rank not in refusing)
        taken = {(r.rank, r.layer, r.slot) for r in reloads}
        assert len(taken) == len(reloads), "two experts for one slot"
        self.loaded = tuple(r for r in self.loaded if (r.rank, r.layer, r.slot) not in taken)
        by_rank: dict[RankId, list[Reload]] = {}
        for reload in reloads:
            by_rank.setdefault(reload.rank, []).append(reload)
        for rank, wanted in by_rank.items():
            self._next_request += 1
            self._under_way[self._next_request] = Loading(rank, tuple(wanted))
            self._owe(self._next_request, rank, now)
            loads = tuple(SlotLoad(r.layer, r.slot, r.expert) for r in wanted)
            self._send(rank, LoadExperts(self._next_request, loads))

    def refusing(self, now: float) -> frozenset[RankId]:
        """Ranks that are not to be asked for loads now."""
        since = now - self._policy.repeat_window_s
        return frozenset(rank for rank, at in self._refused.items() if at > since)

    def _owe(self, request: int, rank: RankId, now: float) -> None:
        then = f"rank {rank} is not asked for a while, and others may be"
        lapse = partial(self._give_up, request)
        due = now + self._policy.reload_timeout_s
        self._obligations.owe(Obligation(LOAD, request, now, due, then, lapse))

    def _give_up(self, request: int, now: float) -> None:
        """A load was never answered: its slots hold nobody knows what, and no map names them."""
        assert request in self._under_way, f"load {request} is answered, and still owed"
        loading = self._under_way[request]
        patience_s = self._policy.reload_timeout_s
        error = f"no answer within {patience_s:.0f} s"
        unanswered = (loading.rank, Incarnation(0), request, patience_s, 0)
        self.on_loaded(ExpertsLoaded(*unanswered, error=error), now)

    def restore(self, present: Membership, now: float) -> None:
        """Load missing experts into spare slots. Raises ValueError if there is nothing to do."""
        if not present.missing:
            raise ValueError("no expert is missing")
        pending = {(r.layer, r.expert) for r in self.loading}
        wanted = [pair for pair in present.missing if pair not in pending]
        under_way = {(x.rank, x.layer, x.slot) for x in self.loading}
        spare = (present.placement, wanted, under_way, self.refusing(now))
        reloads = assign_reloads(*spare) if wanted else ()
        if not reloads and not pending:
            raise ValueError(
                f"{len(present.missing)} experts are missing and no rank has a spare slot for them:"
                " let a rank rejoin"
            )
        free = into_free_slots(reloads, present)
        self.begin(free, now)
        self._at_boundary = len(free) < len(reloads)

    def on_loaded(self, report: ExpertsLoaded, now: float) -> None:
        """A rank has loaded experts beside the steps, or could not."""
        loading = self._under_way.pop(report.request, None)
        if loading is None:
            return
        assert loading.rank == report.rank, "loaded by another rank than was told to"
        self._obligations.met(LOAD, report.request)
        count = len(loading.reloads)
        self._tell(LoadedBeside(report.rank, count, report.seconds, report.error))
        if report.error is None:
            self.loaded += loading.reloads
        else:
            if not report.taken_over:
                self._refused[report.rank] = now
            log.warning("rank %d could not load experts: %s", report.rank, report.error)

    def forget(self, rank: RankId) -> None:
        """The rank is out: what its process had loaded, or was loading, is gone with it."""
        for request in [k for k, v in self._under_way.items() if v.rank == rank]:
            del self._under_way[request]
            self._obligations.met(LOAD, request)
        self._refused.pop(rank, None)
        self.loaded = tuple(reload for reload in self.loaded if reload.rank != rank)

    def epoch_asked(self) -> None:
        """The epoch that `awaits_epoch` asks for is on its way."""
        self._at_boundary = False

    def epoch_began(
        self, plan: Continue, home: ExpertPlacement, restore_redundancy: bool, now: float
    ) -> None:
        """What the new epoch has taken into use is settled, and what it asks for begins."""
        present = plan.membership
        self.loaded = tuple(
            r for r in self.loaded if r.rank in present.members and r not in plan.taken
        )
        if plan.background:
            self.begin(plan.background, now)
        elif restore_redundancy and not (self._under_way or present.missing):
            self.begin(assign_replicas(present.placement, home, self.refusing(now)), now)


def into_free_slots(reloads: Iterable[Reload], present: Membership) -> list[Reload]:
    """Those into slots that the present epoch does not use.

    The others hold a replica that tokens are sent to: they wait until all have left the epoch.
    """
    index_of, slots = present.placement.index_of, present.placement.slots
    return [r for r in reloads if slots[r.rank][index_of[r.layer]][r.slot] == EMPTY]
