"""Signals of monitors that ask for ranks to go, until they can be done without.

    asked --> tried, in a quiet moment --> under way: drained, or isolated --> all are out
                                      \\-> refused; tried again in the next epoch

A Node's taint, or a GPU that two ranks share, speaks of several ranks at once. What it asks for is
planned for all of them together, before anybody is touched: rank by rank each loss might be
affordable, and nothing left in the end.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from revivemoe.engine.maintenance import Maintenance
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.fleet import DEVICE_IS_BAD
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.events import DeviceFaultRefused, DrainRefused, Tell
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.policy import LevelAction

log = logging.getLogger("revivemoe.engine")

Key = tuple[str, str, tuple[RankId, ...]]
NEVER = Epoch(-1)
TURNED_DOWN = "it was begun, and could not be ended"
NOBODY_ELSE = "without them: nobody else is left, and they are being started anew"
MOST_OPEN = 256
"""Kept at a time; beyond that the oldest is forgotten."""


@dataclass(frozen=True)
class Signal:
    """What a monitor says of one device, link or host, and what the policy makes of it."""

    source: str
    code: str
    ranks: tuple[RankId, ...]
    """All that it speaks of."""
    level: int
    action: LevelAction
    detail: str

    @property
    def key(self) -> Key:
        return (self.source, self.code, self.ranks)

    @property
    def shared(self) -> bool:
        return len(self.ranks) > 1

    def asks_as(self, other: "Signal") -> bool:
        """Whether the same is asked for."""
        mine, others = (self.key, self.level, self.action), (other.key, other.level, other.action)
        return mine == others

    def fault(self, rank: RankId) -> Fault:
        said = f"{self.code}: {self.detail}" if self.detail else self.code
        return Fault(rank, "device_fault", said, self.level)


def about_the_same(one: Key, other: Key) -> bool:
    """Whether one source says one thing of some of the same ranks: which share a device, it may
    find out later."""
    return one[:2] == other[:2] and not set(one[2]).isdisjoint(other[2])


@dataclass
class Open:
    """One that has not been carried out to its end."""

    signal: Signal
    since: float
    reason: str = ""
    """Why it was refused, if it was."""
    tried: Epoch = NEVER
    """The epoch in which that was decided: in the same one nothing has changed."""
    under_way: bool = False
    """Its ranks go, one after the other."""


class DeviceSignals:
    """Those that ask for ranks to go: drained (L4), or isolated (L5, L6)."""

    def __init__(self, epochs: Epochs, maintenance: Maintenance, tell: Tell) -> None:
        self._epochs, self._maintenance, self._tell = epochs, maintenance, tell
        self._views = epochs.fleet.views
        self._open: dict[Key, Open] = {}

    @property
    def refused(self) -> Iterator[Open]:
        """What the instance cannot afford, as long as it is said."""
        return (one for one in self._open.values() if one.reason)

    def ask(self, signal: Signal, now: float) -> None:
        """These ranks are to go. One alone that is to be isolated goes at once: what is wrong with
        it is worse than to be without it. What was refused, and is only said once more, stays so;
        so do those that have gone for it before.
        """
        before = self._open.get(signal.key)
        self.take_back(signal.key)
        if signal.action == "isolate" and not signal.shared:
            self._carry_out(signal, now)
            return
        views = [self._views[rank] for rank in signal.ranks]
        left = {v.rank for v in views if v.dead and signal.code in v.device_faults}
        self._note(signal, left, takes_out=True)
        self._note(signal, set(signal.ranks) - left, takes_out=not signal.shared)
        refused = before is not None and before.reason and before.signal.asks_as(signal)
        one = replace(before, signal=signal) if before and refused else Open(signal, now)
        while len(self._open) >= MOST_OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            log.warning("%s is forgotten: %d signals are open", oldest[:2], MOST_OPEN)
        self._open[signal.key] = one
        self.tick(now)

    def take_back(self, key: Key) -> None:
        """It is over, or something else is said, be it of some of its ranks or of more. Who has not
        begun to go for it stays, unless another code asks for that."""
        for same in [k for k in self._open if about_the_same(k, key)]:
            one = self._open.pop(same)
            if one.under_way:
                views = [self._views[rank] for rank in one.signal.ranks]
                stay = [v.rank for v in views if not set(v.device_faults) - {one.signal.code}]
                self._maintenance.drains.forget(stay)

    def beyond(self, key: Key) -> list[Signal]:
        """Those of the same, as far as they are of other ranks than these."""
        found = [self._open[k].signal for k in self._open if about_the_same(k, key)]
        left = [(s, tuple(rank for rank in s.ranks if rank not in key[2])) for s in found]
        return [replace(signal, ranks=ranks) for signal, ranks in left if ranks]

    def take_back_of(self, rank: RankId, code: str) -> None:
        """Those that speak of this rank alone, with this code; with any, without one."""
        for key in [k for k in self._open if k[2] == (rank,) and code in ("", k[1])]:
            self.take_back(key)

    @property
    def unsettled(self) -> bool:
        """Whether something may come of one of them in this epoch."""
        present = self._epochs.membership.epoch
        return any(one.under_way or one.tried != present for one in self._open.values())

    def tick(self, now: float) -> None:
        """Try what has not been tried in this epoch, once in each: strength may have come back."""
        for key, one in list(self._open.items()):
            if one.under_way:
                self._follow(key, one, now)
                continue
            members = [rank for rank in one.signal.ranks if self._views[rank].member]
            if members and not self._epochs.quiet:
                continue
            if members and one.tried == self._epochs.membership.epoch:
                continue
            reason = self._cannot_do_without(one.signal, members)
            one.tried = self._epochs.membership.epoch
            if reason is not None:
                self._refuse(one, reason)
            else:
                one.under_way, one.reason = True, ""
                self._carry_out(one.signal, now)

    def _follow(self, key: Key, one: Open, now: float) -> None:
        """Whether all are out by now. In another epoch those that are still here are weighed anew,
        for others may have been lost meanwhile. Whom an operator has brought back may stay.
        """
        views = [self._views[rank] for rank in one.signal.ranks]
        here = [v.rank for v in views if v.member and one.signal.code in v.device_faults]
        if not here:
            self.take_back(key)
        elif not self._epochs.quiet:
            pass
        elif not set(here) & {fault.rank for fault in self._maintenance.drains.leaving}:
            self._leave_here(one, here)
            self._refuse(one, TURNED_DOWN, told=True)
        elif one.tried != self._epochs.membership.epoch:
            one.tried = self._epochs.membership.epoch
            reason = self._cannot_do_without(one.signal, here)
            if reason is not None:
                self._maintenance.drains.withdraw(here, now)
                self._leave_here(one, here)
                self._refuse(one, reason)

    def _leave_here(self, one: Open, ranks: list[RankId]) -> None:
        """These stay: should they be lost otherwise, they may be started where they were."""
        one.under_way = False
        self._note(one.signal, ranks, takes_out=not one.signal.shared)

    def _cannot_do_without(self, signal: Signal, members: list[RankId]) -> str | None:
        """Why the instance could not go on without these members, and without those of its ranks
        that would come in next; None: it can.
        """
        if not members:
            return NOBODY_ELSE if signal.shared and not self._others(signal) else None
        leaving = self._maintenance.drains.leaving
        coming = [r for r in signal.ranks if not (self._views[r].dead or self._views[r].member)]
        plan = self._epochs.plan_for([*map(signal.fault, (*members, *coming)), *leaving])
        return None if isinstance(plan, Continue) else f"without them: {plan.reason}"

    def _others(self, signal: Signal) -> list[RankId]:
        """Ranks it does not speak of that are there, on their way, or may be started."""
        others = [v for v in self._views.values() if v.rank not in signal.ranks]
        return [v.rank for v in others if not v.dead or self._epochs.fleet.trusted(v)]

    def _refuse(self, one: Open, reason: str, told: bool = False) -> None:
        """Told of once; what the reason becomes in later epochs, the status says. `told`: the drain
        itself has said so.
        """
        signal, again, one.reason = one.signal, bool(one.reason), reason
        if again:
            return
        if not (signal.shared or told):
            self._tell(DrainRefused(signal.ranks[0], reason, None))
        what = (signal.source, signal.code, signal.level, signal.action)
        self._tell(DeviceFaultRefused(list(signal.ranks), *what, reason))
        log.warning(
            "%s %s: ranks %s stay where they are: %s",
            signal.source, signal.code, list(signal.ranks), reason,
        )  # fmt: skip

    def _note(self, signal: Signal, ranks: Iterable[RankId], takes_out: bool) -> None:
        for rank in ranks:
            self._views[rank].device_says(signal.code, signal.fault(rank), takes_out)

    def _carry_out(self, signal: Signal, now: float) -> None:
        """Members drain in good order; others hold nothing that would have to be moved. A plan that
        counted on several of them is made anew once, when all are out.
        """
        self._note(signal, signal.ranks, takes_out=True)
        views = [self._views[rank] for rank in signal.ranks]
        drained = [v for v in views if v.member and signal.action == "drain"]
        accused = [v for v in views if not v.dead and v not in drained]
        awaited = [self._strike(view, signal, now) for view in views if view.dead]
        if accused:
            self._epochs.accuse([signal.fault(view.rank) for view in accused], now)
        elif any(awaited):
            self._epochs.replan(now)
        self._maintenance.drain_all([signal.fault(view.rank) for view in drained], now)

    def _strike(self, view: RankView, signal: Signal, now: float) -> bool:
        """One that is out is not to come back. Whether it was awaited."""
        if view.fault is None or view.fault.kind not in DEVICE_IS_BAD:
            view.fault = signal.fault(view.rank)
        return self._epochs.fleet.lives.strike(view, now)
