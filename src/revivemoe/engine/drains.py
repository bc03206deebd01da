"""Ranks that shall leave, or change their role, once what they hold is safe elsewhere.

    asked --> warm (copies fill the prefix caches of the targets) --> moved --> out, at a boundary

One at a time. A drain belongs to the epoch it began in: in another one it begins anew.
"""

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from revivemoe.engine.traffic import Traffic
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.loads import into_free_slots
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.messages.events import DrainBegun, DrainRefused, Tell
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue, RecoveryPlan

log = logging.getLogger("revivemoe.engine")

SETTLE_S = 1.0
"""How long sequences that have moved may take to get on by a token before their rank leaves."""


@dataclass(frozen=True)
class Wanted:
    """A rank that shall leave, or become an expert rank: this process of it, and no later one."""

    fault: Fault
    incarnation: Incarnation
    request_id: str | None
    switch: bool = False


@dataclass
class Drain:
    """One rank on its way out."""

    wanted: Wanted
    epoch: Epoch
    deadline: float
    targets: dict[SeqId, RankId]
    shadows: set[SeqId]
    moved: dict[SeqId, int] = field(default_factory=dict)
    """Sequences that were handed over, and the tokens they had then."""
    settle_until: float | None = None
    """Set once they were."""


class Drains:
    """Those asked for, and the one under way."""

    def __init__(self, epochs: Epochs, traffic: Traffic, tell: Tell) -> None:
        self._epochs, self._traffic, self._ledger = epochs, traffic, traffic.ledger
        self._fleet, self._views, self._tell = epochs.fleet, epochs.fleet.views, tell
        self._drain: Drain | None = None
        self._asked: deque[Wanted] = deque()

    @property
    def pending(self) -> bool:
        """Whether one is under way or wanted."""
        return self._drain is not None or bool(self._asked)

    @property
    def under_way(self) -> Drain | None:
        return self._drain

    @property
    def draining(self) -> bool:
        return self._drain is not None

    @property
    def leaving(self) -> list[Fault]:
        """Of ranks that are on their way out, or are to go."""
        drains = [] if self._drain is None else [self._drain.wanted]
        return [w.fault for w in (*drains, *self._asked) if not w.switch and self._is_there(w)]

    def ask(self, fault: Fault, request_id: str | None, switch: bool = False) -> bool:
        """Take a rank out, or make it an expert rank. False if it is on its way already. One that
        changes its role now goes after that.
        """
        view = self._views[fault.rank]
        asked = any(w.fault.rank == view.rank and self._is_there(w) for w in self._asked)
        leaving = view.draining and self._epochs.changing_role != view.rank
        if view.dead or leaving or asked:
            if not (switch or view.dead):
                self._take_over(fault, request_id)
            return False
        if not switch:
            view.fault = fault
        self._asked.append(Wanted(fault, view.incarnation, request_id, switch))
        return True

    def _take_over(self, fault: Fault, request_id: str | None) -> None:
        """What a device has asked for somebody else asks for, too: he alone takes it back. Who is
        to go does not change its role first; what was moved for that is moved for this.
        """

        def his(wanted: Wanted) -> Wanted:
            if wanted.fault.rank != fault.rank or not _outweighs(fault, wanted):
                return wanted
            if wanted.switch:
                self._tell_it_leaves(wanted, fault)
            self._views[fault.rank].fault = fault
            return replace(wanted, fault=fault, request_id=request_id, switch=False)

        self._asked = deque(map(his, self._asked))
        if self._drain is not None and self._epochs.changing_role != fault.rank:
            self._drain.wanted = his(self._drain.wanted)

    def _tell_it_leaves(self, switch: Wanted, fault: Fault) -> None:
        reason = f"it is to leave ({fault.kind}: {fault.detail})"
        self._tell(DrainRefused(fault.rank, reason, switch.request_id))

    def forget(self, ranks: Collection[RankId]) -> None:
        """These need not go for what their devices have said, if they have not begun to."""
        self._asked = deque(w for w in self._asked if not self._may_stay(w, ranks))

    def withdraw(self, ranks: Collection[RankId], now: float) -> None:
        """These are to stay, whatever their devices say."""
        self.forget(ranks)
        drain = self._drain
        if drain is not None and self._may_stay(drain.wanted, ranks):
            self._drain = None
            self._fleet.lives.drain(self._views[drain.wanted.fault.rank], False, now)

    @staticmethod
    def _may_stay(wanted: Wanted, ranks: Collection[RankId]) -> bool:
        return wanted.fault.kind == "device_fault" and wanted.fault.rank in ranks

    def _is_there(self, wanted: Wanted) -> bool:
        """Whether the process that was meant still runs."""
        view = self._views[wanted.fault.rank]
        return not view.dead and view.incarnation == wanted.incarnation

    def postpone(self, seconds: float) -> None:
        """The host itself stood still for so long."""
        if self._drain is not None:
            self._drain.deadline += seconds

    def tick(self, now: float) -> bool:
        """Get on with it, if the epochs are quiet. Returns whether there is one."""
        self._follow_epoch(now)
        if self._drain is not None:
            self._go_on(self._drain, now)
        elif (wanted := self._next()) is not None:
            self._begin(wanted, now)
        else:
            return False
        return True

    def _next(self) -> Wanted | None:
        """Who is not a member yet, for it is changing its role, lets others go first."""
        self._asked = deque(w for w in self._asked if self._is_there(w))
        members = self._epochs.membership.members
        wanted = next((w for w in self._asked if w.fault.rank in members), None)
        if wanted is not None:
            self._asked.remove(wanted)
        return wanted

    def _follow_epoch(self, now: float) -> None:
        """In another epoch than its own a drain begins anew, if its rank can still go."""
        drain, present = self._drain, self._epochs.membership
        if drain is None or drain.epoch == present.epoch:
            return
        self._drain = None
        wanted, rank = drain.wanted, drain.wanted.fault.rank
        may_go = rank in (present.attention if wanted.switch else present.members)
        if may_go and self._is_there(wanted):
            self._fleet.lives.drain(self._views[rank], False, now)
            leave = next((w.fault for w in self._asked if _leaves(w, rank)), None)
            if wanted.switch and leave is not None:
                self._tell_it_leaves(wanted, leave)
            else:
                self._asked.appendleft(wanted)

    def _begin(self, wanted: Wanted, now: float) -> None:
        epochs, fault, request_id = self._epochs, wanted.fault, wanted.request_id
        view, present = self._views[fault.rank], epochs.membership
        plan = self._plan(wanted)
        if not isinstance(plan, Continue) or (wanted.switch and not plan.switches):
            self._refuse(wanted, plan.reason)
            return
        self._fleet.lives.drain(view, True, now)
        targets = {m.seq_id: m.to for m in plan.migrations}
        owned = [seq_id for seq_id in self._ledger.owned_by(fault.rank) if seq_id in targets]
        shadows = {self._ledger.warm(seq_id, targets[seq_id]) for seq_id in owned}
        deadline = now + epochs.policy.drain_timeout_s
        self._drain = Drain(wanted, present.epoch, deadline, targets, shadows)
        if not wanted.switch:
            loads = (*plan.reloads, *plan.background)
            here = [r for r in loads if r.rank in present.experts]
            epochs.loads.begin(into_free_slots(here, present), now)
        told = (fault.rank, fault.kind, fault.detail, len(owned), request_id)
        self._tell(DrainBegun(*told))
        if shadows:
            self._traffic.wake()
        else:
            self._go_on(self._drain, now)

    def _plan(self, wanted: Wanted) -> RecoveryPlan:
        """Others that are to go take nothing over, unless nobody else could."""
        if wanted.switch:
            return self._epochs.plan_switch(wanted.fault.rank)
        without_all = self._epochs.plan_for([wanted.fault, *self.leaving])
        if isinstance(without_all, Continue):
            return without_all
        return self._epochs.plan_for([wanted.fault])

    def _go_on(self, drain: Drain, now: float) -> None:
        if drain.settle_until is None:
            warm = not any(self._ledger.warming(shadow) for shadow in drain.shadows)
            if (warm and not self._epochs.loads.loading) or now >= drain.deadline:
                self._move(drain, now)
        elif now >= drain.settle_until or self._settled(drain):
            self._leave(drain, now)

    def _leave(self, drain: Drain, now: float) -> None:
        """Out, at the next boundary; unless what was to be made ready for that is not there. A
        planned change is no reason to stop the instance, or to restart a rank."""
        epochs, wanted = self._epochs, drain.wanted
        kind, rank, request_id = wanted.fault.kind, wanted.fault.rank, wanted.request_id
        if wanted.switch:
            epochs.change([], kind, now, request_id=request_id, switch=rank)
            return
        plan = epochs.plan_for([wanted.fault])
        if isinstance(plan, Continue):
            epochs.change([wanted.fault], kind, now, request_id=request_id)
        else:
            self._drain = None
            self._fleet.lives.drain(self._views[rank], False, now)
            self._refuse(wanted, plan.reason)

    def _refuse(self, wanted: Wanted, reason: str) -> None:
        rank = wanted.fault.rank
        self._views[rank].taken_out = False
        self._tell(DrainRefused(rank, reason, wanted.request_id))
        log.warning("rank %d cannot be drained: %s", rank, reason)

    def _move(self, drain: Drain, now: float) -> None:
        """Hand the sequences over: what is computed of them lies in the targets' prefix caches."""
        attention = self._epochs.membership.attention
        others = [r for r in attention if not self._views[r].draining]
        for number, seq_id in enumerate(self._ledger.owned_by(drain.wanted.fault.rank)):
            target = drain.targets.get(seq_id)
            if target not in others:
                target = others[number % len(others)]
            drain.moved[seq_id] = self._ledger.num_output(seq_id) or 0
            self._ledger.hand_over(seq_id, target)
        drain.settle_until = now + SETTLE_S
        self._traffic.tell_migrated(list(drain.moved))
        if drain.moved:
            self._traffic.wake()
        else:
            self._go_on(drain, now)

    def _settled(self, drain: Drain) -> bool:
        """Whether every sequence that moved has got on, or is finished."""
        for seq_id, before in drain.moved.items():
            tokens = self._ledger.num_output(seq_id)
            if tokens is not None and tokens <= before:
                return False
        return True


def _leaves(wanted: Wanted, rank: RankId) -> bool:
    return wanted.fault.rank == rank and not wanted.switch


def _outweighs(fault: Fault, wanted: Wanted) -> bool:
    """Whether a rank goes for `fault` rather than for what was wanted of it before."""
    before = wanted.fault.kind
    return wanted.switch or (
        fault.kind != before and (before == "device_fault" or fault.kind == "isolate")
    )
