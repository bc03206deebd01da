"""Carries one change of epoch out, stage by stage: fence, roll back, plan, migrate, domain, resume.

    Idle -> Leaving (planned: all stop at a step boundary) \\
         -> Fencing (a fault: at once)                      -> plan -> Resuming -> Idle
                                                                 \\-> Restarting -> plan

A state machine fed with reports, faults and the time. It never waits for the accused. A fault
during a recovery starts again from the fence with the union of the faults. A survivor that misses
a stage's deadline becomes a fault itself, so every recovery ends.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from revivemoe.epochs.ports import RankPort, SequenceOwner
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.stages import (
    Failed,
    Fencing,
    Finished,
    Idle,
    Recovered,
    Restarting,
    Resuming,
    Stage,
)
from revivemoe.ids import Epoch, RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, Table
from revivemoe.messages.commands import Configure, DomainSpec, Fence, Stop, SwitchRole
from revivemoe.messages.events import Configured, Fenced, RestartPlanned, Tell
from revivemoe.messages.reports import FenceAck, Resumed
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue, GiveUp, Restart
from revivemoe.recovery.planner import plan_recovery
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.world import World


class Coordinator:
    """One recovery at a time. Every call returns `Finished` in the moment the recovery ends."""

    def __init__(
        self,
        ranks: RankPort,
        restart: Callable[[RankId], None],
        sequences: SequenceOwner,
        policy: Policy,
        clock: Callable[[], float],
        tell: Tell,
    ) -> None:
        """`restart`: start a new process for a rank, once the present one, if any, is gone.
        `clock` only times the stages; every decision takes its time as an argument.
        """
        self._ranks, self._start_anew = ranks, restart
        self._sequences, self._policy = sequences, policy
        self._clock, self._tell = clock, tell
        self.state: Stage = Idle()
        self._step = 0
        self._highest_epoch = Epoch(0)
        self._current: list[Fault] = []
        """Faults of the recovery under way, without those of ranks started anew since."""
        self._planned = False
        """Whether the change under way is a planned one."""
        self.held: dict[RankId, Table] = {}
        """What the slots of those hold that have acknowledged a fence of the change under way."""

    @property
    def active(self) -> bool:
        return not isinstance(self.state, Idle)

    @property
    def planned(self) -> bool:
        """Whether the change under way is a planned one, and nobody is accused."""
        return self._planned

    @property
    def record(self) -> RecoveryRecord:
        """Of the recovery under way."""
        assert not isinstance(self.state, Idle), "no recovery is under way"
        return self.state.record

    @property
    def plan(self) -> Continue | None:
        """The plan being carried out, once there is one."""
        return self.state.plan if isinstance(self.state, Resuming) else None

    @staticmethod
    def _fenced(state: "Fencing | Restarting") -> set[RankId]:
        return set(state.acks) if isinstance(state, Fencing) else state.fenced

    @property
    def holding(self) -> bool:
        """Whether everybody is fenced and stays so until told to go on."""
        state = self.state
        return isinstance(state, Fencing) and state.hold and not state.waiting

    # ---- fence -------------------------------------------------------------------------------

    def begin(
        self,
        present: Membership,
        faults: Sequence[Fault],
        now: float,
        *,
        cause: str | None = None,
        absent: Collection[RankId] = (),
    ) -> None:
        """Fence: a new epoch, the accused are killed, the survivors leave the broken domain.

        `absent`: members that are being started anew, and so have no part in any domain.
        """
        configured = self.plan.membership.members if self.plan is not None else ()
        if self._planned:  # Who was to leave in good order is not accused by another's fault.
            self._current, self._planned = [], False
        record = self._open_record(present, faults, now, cause)
        accused = {f.rank for f in self._current}
        members = {*present.members, *configured} - accused - set(absent)
        assert record.epoch > present.epoch, "a fence to an epoch that has begun"
        self._fence(record, members, now, at_boundary=False)

    def begin_at_boundary(
        self, present: Membership, faults: Sequence[Fault], now: float, cause: str, hold: bool
    ) -> None:
        """Change the epoch where all stop together before a step. Nobody is accused: ranks of
        `faults` take part, and are told to stop once they are out. `hold`: then wait for `resume`.
        """
        assert not self.active, "another change of epoch is under way"
        self._planned = True
        record = self._open_record(present, faults, now, cause)
        self._fence(record, set(present.members), now, at_boundary=True, hold=hold)

    def _fence(
        self,
        record: RecoveryRecord,
        members: set[RankId],
        now: float,
        at_boundary: bool,
        hold: bool = False,
    ) -> None:
        patience_s = (
            self._policy.boundary_timeout_s if at_boundary else self._policy.fence_timeout_s
        )
        before = self.state
        hold = hold or (isinstance(before, Fencing) and before.hold)
        self.state = Fencing(
            epoch=record.epoch,
            deadline=now + patience_s,
            record=record,
            waiting=set(members),
            at_boundary=at_boundary,
            hold=hold,
        )
        for rank in sorted(members):
            self._ranks.send(rank, Fence(record.epoch, at_boundary))
        lost = sorted({f.rank for f in record.faults})
        self._tell(Fenced(record.epoch, record.cause, lost, len(members), at_boundary))

    def _open_record(
        self, present: Membership, faults: Sequence[Fault], now: float, cause: str | None
    ) -> RecoveryRecord:
        """A new one; if a recovery is under way it goes on, with the union of the faults."""
        epoch = Epoch(max(self._highest_epoch, present.epoch) + 1)
        self._highest_epoch = epoch
        if isinstance(self.state, Idle):
            self.held = {}
            first = faults[0].kind if faults else "communication"
            self._current = []
            record = RecoveryRecord(epoch, cause or first, [], now)
        else:
            record = self.state.record
            record.epoch = epoch
        for fault in faults:
            self._add(record, fault)
        return record

    def add_fault(self, fault: Fault) -> None:
        """A member turns out to be at fault while the fence is up: plan without it."""
        self._add(self.record, fault)

    def _add(self, record: RecoveryRecord, fault: Fault) -> None:
        self.held.pop(fault.rank, None)
        if all(f.rank != fault.rank for f in self._current):
            self._current.append(fault)
            record.faults.append(fault)

    def on_ack(self, ack: FenceAck) -> None:
        """A survivor has left and rolled back."""
        state = self.state
        if isinstance(state, Fencing) and ack.epoch == state.epoch and ack.rank in state.waiting:
            state.waiting.discard(ack.rank)
            state.acks[ack.rank] = ack
            if ack.slots is not None:
                self.held[ack.rank] = ack.slots
            assert not ack.rolled_back or not state.at_boundary, "rolled back at a boundary"
            state.record.rolled_back += ack.rolled_back
            self._step = max(self._step, ack.next_step)

    @property
    def fenced(self) -> bool:
        """Whether everybody has acknowledged, so that the plan can be made."""
        state = self.state
        return isinstance(state, Fencing) and not state.waiting and not state.hold

    def release(self) -> None:
        """End a `hold`."""
        if isinstance(self.state, Fencing):
            self.state.hold = False

    # ---- plan --------------------------------------------------------------------------------

    def proceed(self, world: Callable[[], World], domain: DomainSpec, wake: int) -> Finished | None:
        """Once all survivors are fenced, or a rank started anew is ready: plan, and carry it out.

        `world` is asked after the survivors' holdings have been reconciled with the log.
        """
        state = self.state
        if isinstance(state, Fencing) and self.fenced:
            self._close_fence(state)
        elif not isinstance(state, Restarting):
            return None
        began, record = self._clock(), state.record
        seen = world()
        plan = plan_recovery(seen, self._current, self._policy)
        record.phases["plan"] += self._clock() - began
        match plan:
            case GiveUp():
                record.reason = plan.reason
                return self._give_up(plan.reason, record)
            case Restart():
                self._restart(plan, state)
                return None
            case Continue():
                record.reason = (
                    f"{record.reason}; {plan.reason}" if record.restarted else plan.reason
                )
                self._execute(plan, state, seen, domain, wake)
                return None

    def _close_fence(self, state: Fencing) -> None:
        record, fenced = state.record, self._clock()
        rollback_s = max((a.rollback_s for a in state.acks.values()), default=0.0)
        record.phases["rollback"] = rollback_s
        record.phases["fence"] = max(0.0, fenced - record.started - rollback_s)
        for rank, ack in sorted(state.acks.items()):
            record.reconciled += self._sequences.reconcile(rank, ack.num_output)

    def _give_up(self, reason: str, record: RecoveryRecord) -> Failed:
        self.state = Idle()
        record.outcome, record.finished = "failed", self._clock()
        return Failed(reason, record)

    def _restart(self, plan: Restart, state: "Fencing | Restarting") -> None:
        """The survivors stay fenced; the streams wait."""
        record, fenced = state.record, self._fenced(state)
        if isinstance(state, Fencing):
            deadline = self._clock() + self._policy.restart_timeout_s
            self.state = Restarting(state.epoch, deadline, record, fenced)
        if plan.ranks:
            record.reason = plan.reason
            record.restarted = tuple(sorted({*record.restarted, *plan.ranks}))
            self._tell(RestartPlanned(list(plan.ranks), plan.reason))
        fenced -= set(plan.ranks)
        for rank in plan.ranks:
            self.renewed(rank)
            self._start_anew(rank)

    def renewed(self, rank: RankId) -> None:
        """A new process of the rank is on its way: what was wrong with the last one is over."""
        self._current = [f for f in self._current if f.rank != rank]
        self.held.pop(rank, None)

    def _execute(
        self,
        plan: Continue,
        state: "Fencing | Restarting",
        world: World,
        domain: DomainSpec,
        wake: int,
    ) -> None:
        began, record = self._clock(), state.record
        # Compound faults raise the epoch more than once before a plan is carried out.
        plan = replace(plan, membership=plan.membership.at(state.epoch))
        record.experts_dropped, record.experts_masked = plan.experts_dropped, len(plan.masked)
        record.experts_reloaded = len(plan.reloads) + len(world.loaded) + _brought_in(plan, world)
        if plan.role_switched is not None:
            record.role_switched = plan.role_switched
        for move in plan.migrations:
            self._sequences.hand_over(move.seq_id, move.to)
            record.migrated += 1
            record.recomputed_tokens += move.num_tokens
        self._configure(plan, state, domain, wake)
        now = self._clock()
        record.phases["migrate"] += now - began
        patience_s = self._policy.resume_timeout_s
        if plan.reloads or plan.membership.dense != world.membership.dense:
            patience_s += self._policy.reload_timeout_s
        self.state = Resuming(plan, now + patience_s, now, record, set(plan.membership.members))

    def _configure(
        self, plan: Continue, state: "Fencing | Restarting", domain: DomainSpec, wake: int
    ) -> None:
        """Tell everybody who has left the old epoch what becomes of it."""
        present, fenced = plan.membership, self._fenced(state)
        assert not {f.rank for f in self._current} & set(present.members), "accused, and a member"
        configure = Configure(self._step, present, domain, wake)
        for rank in present.members:
            self._ranks.send(rank, configure)
        aside = {s.rank: s.table for s in plan.switches if plan.switch_aside}
        for rank, table in aside.items():  # some of them may have had no part in any epoch yet
            self._ranks.send(rank, SwitchRole(present, table, domain))
        for rank in sorted(fenced - set(present.members) - aside.keys()):
            self._ranks.send(rank, Stop())
        self._tell(Configured(state.epoch, plan.reason, len(plan.migrations)))

    # ---- resume ------------------------------------------------------------------------------

    def on_resumed(self, resumed: Resumed, now: float) -> Finished | None:
        """A member has met all others in the new domain."""
        state = self.state
        if not isinstance(state, Resuming) or resumed.epoch != state.plan.membership.epoch:
            return None
        if len(state.waiting) == len(state.plan.membership.members):
            self._sequences.met()
        state.waiting.discard(resumed.rank)
        state.domain_s = max(state.domain_s, resumed.domain_s)
        state.experts_s = max(state.experts_s, resumed.experts_s)
        if state.waiting:
            return None
        record = state.record
        record.phases["domain"] = state.domain_s
        record.phases["experts"] = state.experts_s
        spent = state.configured + state.domain_s + state.experts_s
        record.phases["resume"] = max(0.0, now - spent)
        record.outcome, record.finished = "restarted" if record.restarted else "recovered", now
        self.state, self._planned = Idle(), False
        return Recovered(state.plan, record)

    # ---- deadlines ---------------------------------------------------------------------------

    def overdue(self, now: float) -> list[Fault] | None:
        """What to begin again with once the present stage has missed its deadline; None before.

        A fence is answered by each rank for itself: whoever did not is a fault. In the resume
        stage all wait for the one that is stuck, so nobody is accused: the next fence finds it.
        Nor at a step boundary: the fence at once, which follows, does not wait for one.
        """
        state = self.state
        if isinstance(state, Idle) or now < state.deadline or self.holding:
            return None
        match state:
            case Fencing(at_boundary=False):
                detail = "the fence was not answered within its deadline"
                return [Fault(rank, "fence_timeout", detail) for rank in sorted(state.waiting)]
            case _:
                return []

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long: nobody else is late by that."""
        if not isinstance(self.state, Idle):
            self.state.deadline += seconds


def _brought_in(plan: Continue, world: World) -> int:
    """Experts that ranks which have switched roles have loaded meanwhile."""
    back = [r for r in world.ready if r in world.switched and r in plan.membership.members]
    return sum(e != EMPTY for r in back for row in world.tables.get(r, ()) for e in row)
