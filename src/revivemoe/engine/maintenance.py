"""Planned changes of the membership: made at a step boundary, with nothing rolled back.

    drain    a rank goes: what it holds is made ready elsewhere first, then it leaves
    rejoin   a rank comes back: its new process is taken in once it has loaded
    restore  experts that were loaded beside the steps are taken into use
    pause    all ranks stop together until told to go on

One at a time. A fault comes before all of them; what it interrupts is taken up again after it.
"""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from revivemoe.epochs.state import Serving
from revivemoe.ids import RankId, SeqId
from revivemoe.membership.placement import EMPTY
from revivemoe.messages.reports import (
    ExpertsLoaded,
    LoadExperts,
    SlotLoad,
)
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.planner import Continue
from revivemoe.recovery.repair import Reload, assign_reloads, assign_replicas

if TYPE_CHECKING:
    from revivemoe.engine.engine import Engine

log = logging.getLogger("revivemoe.engine.maintenance")

SETTLE_S = 1.0
"""How long sequences that have moved may take to get on by a token before their rank leaves."""


@dataclass(frozen=True)
class Wanted:
    """A rank that shall leave, or change its role, once what it holds is safe elsewhere."""

    fault: Fault
    request_id: str | None
    switch: bool = False


@dataclass
class Drain:
    """One rank on its way out."""

    wanted: Wanted
    deadline: float
    targets: dict[SeqId, RankId]
    shadows: set[SeqId]
    moved: dict[SeqId, int] = field(default_factory=dict)
    """Sequences that were handed over, and the tokens they had then."""
    settle_until: float | None = None
    """Set once they were."""


@dataclass
class Loading:
    """Experts being loaded beside the steps, by one rank."""

    rank: RankId
    reloads: tuple[Reload, ...]


class Maintenance:
    """Decides when the engine makes its next planned change."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._drain: Drain | None = None
        self._asked: deque[Wanted] = deque()
        """Drains that wait for their turn."""
        self._loading: dict[int, Loading] = {}
        self._loaded: list[Reload] = []
        """In their slots, but not in the map yet."""
        self._next_request = 0
        self._restore_id: str | None = None
        self._restore_now = False
        """Some missing experts only fit into slots that are in use: load them at a boundary."""
        self._pause: tuple[bool, str | None] = (False, None)
        self._joins: dict[RankId, str | None] = {}
        self._switch_again = False
        """A rank that was switching roles is gone: another one may take over."""

    # ---- asked for ---------------------------------------------------------------------------

    def drain(self, fault: Fault, now: float, request_id: str | None = None) -> None:
        """Take a rank out at a step boundary. Refused (with an event) if nobody could take over."""
        if self._may_ask(fault.rank):
            self._engine.ranks[fault.rank].fault = fault
            self._asked.append(Wanted(fault, request_id))
            self.tick(now)

    def switch_role(self, rank: RankId, now: float, request_id: str | None) -> None:
        """Make an attention rank an expert rank, beside the others. Raises ValueError."""
        if refusal := self._engine.refuse_switch(rank):
            raise ValueError(refusal)
        if not self._may_ask(rank):
            raise ValueError(f"rank {rank} is on its way out already")
        fault = Fault(rank, "role_switch", "asked by an operator")
        self._asked.append(Wanted(fault, request_id, switch=True))
        self._joins[rank] = request_id
        self.tick(now)

    def _may_ask(self, rank: RankId) -> bool:
        view = self._engine.ranks[rank]
        asked = any(wanted.fault.rank == rank for wanted in self._asked)
        return not (view.dead or view.draining or asked)

    def switch_failed(self) -> None:
        """A rank that was switching roles in the background is gone."""
        self._switch_again = True

    def rejoin(self, rank: RankId, now: float, request_id: str | None) -> None:
        """Start a new process for a rank that is out. Raises ValueError if it is not."""
        engine = self._engine
        if rank not in engine.ranks:
            raise ValueError(f"id {rank} is not a rank of this instance")
        view = engine.ranks[rank]
        if not view.dead:
            raise ValueError(f"rank {rank} is not out: it has a process")
        if view.restart_when_gone:
            raise ValueError(f"a new process of rank {rank} is under way already")
        self._joins[rank] = request_id
        engine.fleet.replace(rank, now)

    def restore(self, now: float, request_id: str | None) -> None:
        """Load missing experts into spare slots. Raises ValueError if there is nothing to do."""
        engine = self._engine
        if not engine.missing:
            raise ValueError("no expert is missing")
        pending = {(r.layer, r.expert) for r in self._reloading()}
        wanted = [pair for pair in engine.missing if pair not in pending]
        reloads = assign_reloads(engine.placement, wanted) if wanted else ()
        if not reloads and not pending:
            raise ValueError(
                f"{len(engine.missing)} experts are missing and no rank has a spare slot for them: "
                "let a rank rejoin"
            )
        self._restore_id = request_id
        free, used = self._split(reloads)
        self._load(free)
        self._restore_now = bool(used)

    def pause(self, request_id: str | None) -> None:
        """Stop all ranks at the next step boundary."""
        self._pause = (True, request_id)

    def unpause(self) -> None:
        """A pause that has not begun will not."""
        self._pause = (False, None)

    # ---- what happens ------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Make the next planned change, if the engine is free for it."""
        engine = self._engine
        if not isinstance(engine.state, Serving) or engine.coordinator.active:
            return
        joiners = engine.fleet.joining
        wanted, request_id = self._pause
        if wanted:
            self._pause = (False, None)
            engine.change_epoch([], "pause", now, hold=True, request_id=request_id)
        elif joiners:
            ids = [self._joins.pop(v.rank, None) for v in joiners]
            cause = "rejoin"
            if any(v.rank in engine.fleet.switched for v in joiners):
                cause = "role_switch"
            engine.change_epoch([], cause, now, request_id=next(filter(None, ids), None))
        elif self._switch_again:
            self._switch_again = False
            plan = engine.plan_for([])
            if isinstance(plan, Continue) and plan.switches:
                engine.change_epoch([], "role_switch", now)
        elif self._drain is not None:
            self._go_on_draining(self._drain, now)
        elif self._asked:
            self._begin_drain(self._asked.popleft(), now)
        elif (self._loaded or self._restore_now) and not self._loading:
            self._restore_now = False
            engine.change_epoch([], "restore_experts", now, request_id=self._restore_id)

    def interrupt(self) -> None:
        """A fault comes first: the drain begins anew after it, if it is still wanted."""
        drain, self._drain = self._drain, None
        if drain is not None:
            self._engine.ranks[drain.wanted.fault.rank].draining = False
            self._asked.appendleft(drain.wanted)

    def forget(self, rank: RankId) -> None:
        """The rank is out: what its process had loaded, or was loading, is gone with it."""
        self._loading = {k: v for k, v in self._loading.items() if v.rank != rank}
        self._loaded = [reload for reload in self._loaded if reload.rank != rank]

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long."""
        if self._drain is not None:
            self._drain.deadline += seconds

    def after(self, plan: Continue, now: float) -> None:
        """A new epoch runs: what it has taken into use is settled, and what it asks for begins."""
        members = plan.topology.members
        used = plan.placement
        self._loaded = [r for r in self._loaded if r.rank in members and r not in plan.taken]
        self._asked = deque(w for w in self._asked if w.fault.rank in members)
        if self._drain is not None and self._drain.wanted.fault.rank not in members:
            self._drain = None
        elif self._drain is not None and self._drain.settle_until is not None:
            self.interrupt()  # it is still there: whether it shall go is asked again
        if plan.background:
            self._load(plan.background)
        elif self._engine.config.policy.restore_redundancy and not self._reloading():
            self._load(assign_replicas(used, self._engine.fleet.home))

    def on_loaded(self, report: ExpertsLoaded, now: float) -> None:
        """A rank has loaded experts beside the steps, or could not."""
        loading = self._loading.pop(report.request, None)
        if loading is None:
            return
        told = {"id": report.rank, "experts": len(loading.reloads), "seconds": report.seconds}
        self._engine.event("experts_loaded", {**told, "error": report.error})
        if report.error is None:
            self._loaded += loading.reloads
        else:
            log.warning("rank %d could not load experts: %s", report.rank, report.error)
        self.tick(now)

    def reloads(self) -> tuple[tuple[Reload, ...], tuple[Reload, ...]]:
        """Experts that lie in slots the map does not name, and those under way."""
        return tuple(self._loaded), tuple(self._reloading())

    # ---- how ---------------------------------------------------------------------------------

    def _reloading(self) -> list[Reload]:
        return [reload for loading in self._loading.values() for reload in loading.reloads]

    def _load(self, reloads: Iterable[Reload]) -> None:
        by_rank: dict[RankId, list[Reload]] = {}
        reloads = tuple(reloads)
        taken = {(r.rank, r.layer, r.slot) for r in reloads}
        self._loaded = [r for r in self._loaded if (r.rank, r.layer, r.slot) not in taken]
        for reload in reloads:
            by_rank.setdefault(reload.rank, []).append(reload)
        for rank, wanted in by_rank.items():
            self._next_request += 1
            self._loading[self._next_request] = Loading(rank, tuple(wanted))
            loads = tuple(SlotLoad(r.layer, r.slot, r.expert) for r in wanted)
            self._engine.fleet.send(rank, LoadExperts(self._next_request, loads))

    def _split(self, reloads: Iterable[Reload]) -> tuple[list[Reload], list[Reload]]:
        """Those into slots that the present epoch does not use, and the others.

        The others hold a replica that tokens are sent to: they wait until all have left the epoch.
        """
        free: list[Reload] = []
        used: list[Reload] = []
        for reload in reloads:
            placement = self._engine.placement
            row = placement.slots[reload.rank][placement.layers.index(reload.layer)]
            (free if row[reload.slot] == EMPTY else used).append(reload)
        return free, used

    def _begin_drain(self, wanted: Wanted, now: float) -> None:
        engine, fault, request_id = self._engine, wanted.fault, wanted.request_id
        view = engine.ranks[fault.rank]
        if view.dead or fault.rank not in engine.topology.members:
            return
        plan = engine.plan_switch(fault.rank) if wanted.switch else engine.plan_for([fault])
        if not isinstance(plan, Continue) or (wanted.switch and not plan.switches):
            told = {"id": fault.rank, "reason": plan.reason, "request_id": request_id}
            engine.event("drain_refused", told)
            log.warning("rank %d cannot be drained: %s", fault.rank, plan.reason)
            return
        view.draining = True
        targets = {m.seq_id: m.to for m in plan.migrations}
        owned = [seq_id for seq_id in engine.ledger.owned_by(fault.rank) if seq_id in targets]
        shadows = {engine.ledger.warm(seq_id, targets[seq_id]) for seq_id in owned}
        deadline = now + engine.config.policy.drain_timeout_s
        self._drain = Drain(wanted, deadline, targets, shadows)
        if not wanted.switch:
            plan_slots = engine.placement.slots  # a rank that only becomes an expert rank has none
            loads = [r for r in (*plan.reloads, *plan.background) if r.rank in plan_slots]
            self._load(self._split(loads)[0])
        told = {"id": fault.rank, "kind": fault.kind, "detail": fault.detail}
        engine.event("drain", {**told, "sequences": len(owned), "request_id": request_id})
        if shadows:
            engine.wake()
        else:
            self._go_on_draining(self._drain, now)

    def _go_on_draining(self, drain: Drain, now: float) -> None:
        engine, wanted = self._engine, drain.wanted
        if drain.settle_until is None:
            warm = not any(engine.ledger.warming(shadow) for shadow in drain.shadows)
            if (warm and not self._loading) or now >= drain.deadline:
                self._move(drain, now)
        elif now >= drain.settle_until or self._settled(drain):
            leaves = [] if wanted.switch else [wanted.fault]
            switch = wanted.fault.rank if wanted.switch else None
            kind, request_id = wanted.fault.kind, wanted.request_id
            engine.change_epoch(leaves, kind, now, request_id=request_id, switch=switch)

    def _move(self, drain: Drain, now: float) -> None:
        """Hand the sequences over: what is computed of them lies in the targets' prefix caches."""
        engine = self._engine
        others = [r for r in engine.topology.attention if not engine.ranks[r].draining]
        for number, seq_id in enumerate(engine.ledger.owned_by(drain.wanted.fault.rank)):
            target = drain.targets.get(seq_id)
            if target not in others:
                target = others[number % len(others)]
            drain.moved[seq_id] = engine.ledger.num_output(seq_id) or 0
            engine.ledger.hand_over(seq_id, target)
        drain.settle_until = now + SETTLE_S
        engine.tell_migrated(list(drain.moved))
        if drain.moved:
            engine.wake()
        else:
            self._go_on_draining(drain, now)

    def _settled(self, drain: Drain) -> bool:
        """Whether every sequence that moved has got on, or is finished."""
        for seq_id, before in drain.moved.items():
            tokens = self._engine.ledger.num_output(seq_id)
            if tokens is not None and tokens <= before:
                return False
        return True
