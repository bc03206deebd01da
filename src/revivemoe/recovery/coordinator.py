"""Carries one recovery out, stage by stage: fence, roll back, plan, migrate, domain, resume.

A state machine fed with reports, faults and the time. It never waits for the accused. A fault
during a recovery starts again from the fence with the union of the faults. A survivor that misses
a stage's deadline becomes a fault itself, so every recovery ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from revivemoe.ids import Epoch, RankId
from revivemoe.messages import Configure, DomainSpec, Fence, FenceAck, Resumed
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.planner import Continue, GiveUp, World, plan_recovery
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.ports import RankPort, SequenceOwner
from revivemoe.recovery.record import RecoveryRecord
from revivemoe.topology import Topology


@dataclass(frozen=True)
class Idle:
    """No recovery under way."""


@dataclass
class Fencing:
    """Waiting for every survivor to have rolled back."""

    epoch: Epoch
    deadline: float
    record: RecoveryRecord
    waiting: set[RankId]
    acks: dict[RankId, FenceAck] = field(default_factory=dict)


@dataclass
class Resuming:
    """Waiting for every member to have agreed on the first step of the new epoch."""

    plan: Continue
    deadline: float
    configured: float
    record: RecoveryRecord
    waiting: set[RankId]
    domain_s: float = 0.0


@dataclass(frozen=True)
class Recovered:
    """The new epoch runs."""

    plan: Continue
    record: RecoveryRecord


@dataclass(frozen=True)
class Failed:
    """Recovery does not cover what happened."""

    reason: str
    record: RecoveryRecord


Finished = Recovered | Failed
Events = Callable[[str, dict[str, object]], None]


class Coordinator:
    """One recovery at a time. Every call returns `Finished` in the moment the recovery ends."""

    def __init__(
        self,
        ranks: RankPort,
        sequences: SequenceOwner,
        policy: Policy,
        clock: Callable[[], float],
        events: Events,
    ) -> None:
        """`clock` only times the stages; every decision takes its time as an argument."""
        self._ranks, self._sequences, self._policy = ranks, sequences, policy
        self._clock, self._events = clock, events
        self.state: Idle | Fencing | Resuming = Idle()
        self._step = 0
        self._highest_epoch = Epoch(0)

    @property
    def active(self) -> bool:
        return not isinstance(self.state, Idle)

    @property
    def record(self) -> RecoveryRecord:
        """Of the recovery under way."""
        assert not isinstance(self.state, Idle), "no recovery is under way"
        return self.state.record

    @property
    def plan(self) -> Continue | None:
        """The plan being carried out, once there is one."""
        return self.state.plan if isinstance(self.state, Resuming) else None

    def begin(self, topology: Topology, faults: Sequence[Fault], now: float) -> None:
        """Fence: a new epoch, the accused are killed, the survivors leave the broken domain."""
        epoch = Epoch(max(self._highest_epoch, topology.epoch) + 1)
        self._highest_epoch = epoch
        record = self._open_record(epoch, faults, now)
        lost = {f.rank for f in record.faults}
        survivors = {rank for rank in topology.members if rank not in lost}
        deadline = now + self._policy.fence_timeout_s
        self.state = Fencing(epoch, deadline, record, survivors)
        for rank in survivors:
            self._ranks.send(rank, Fence(epoch))
        for rank in lost:
            self._ranks.kill(rank)
        self._events("fence", {"epoch": epoch, "lost": sorted(lost), "survivors": len(survivors)})

    def _open_record(self, epoch: Epoch, faults: Sequence[Fault], now: float) -> RecoveryRecord:
        """A new one; if a recovery is under way it goes on, with the union of the faults."""
        if isinstance(self.state, Idle):
            return RecoveryRecord(epoch, list(faults), now)
        previous = self.state.record
        known = {f.rank for f in previous.faults}
        return RecoveryRecord(
            epoch,
            [*previous.faults, *(f for f in faults if f.rank not in known)],
            previous.started,
            last_old_step=previous.last_old_step,
            migrated=previous.migrated,
            recomputed_tokens=previous.recomputed_tokens,
            reconciled=previous.reconciled,
        )

    def on_ack(self, ack: FenceAck) -> None:
        """A survivor has left and rolled back."""
        state = self.state
        if isinstance(state, Fencing) and ack.epoch == state.epoch and ack.rank in state.waiting:
            state.waiting.discard(ack.rank)
            state.acks[ack.rank] = ack
            self._step = max(self._step, ack.next_step)

    def proceed(self, world: Callable[[], World], domain: DomainSpec, wake: int) -> Finished | None:
        """Once all survivors are fenced: plan, migrate, configure."""
        state = self.state
        if not isinstance(state, Fencing) or state.waiting:
            return None
        record = state.record
        fenced = self._clock()
        record.phases["rollback"] = max((a.rollback_s for a in state.acks.values()), default=0.0)
        record.phases["fence"] = max(0.0, fenced - record.started - record.phases["rollback"])
        for rank, ack in sorted(state.acks.items()):
            record.reconciled += self._sequences.reconcile(rank, ack.num_output)
        plan = plan_recovery(world(), record.faults, self._policy)
        record.reason = plan.reason
        record.phases["plan"] = self._clock() - fenced
        if isinstance(plan, GiveUp):
            self.state = Idle()
            record.outcome, record.finished = "failed", self._clock()
            return Failed(plan.reason, record)
        plan = replace(plan, topology=_at_epoch(plan.topology, state.epoch))
        self._execute(plan, state, domain, wake)
        return None

    def _execute(self, plan: Continue, state: Fencing, domain: DomainSpec, wake: int) -> None:
        began, record = self._clock(), state.record
        record.experts_dropped, record.experts_masked = plan.experts_dropped, len(plan.masked)
        for move in plan.migrations:
            self._sequences.hand_over(move.seq_id, move.to)
            record.migrated += 1
            record.recomputed_tokens += move.num_tokens
        configure = Configure(
            epoch=state.epoch,
            step=self._step,
            topology=plan.topology,
            placement=plan.placement,
            domain=domain,
            wake=wake,
        )
        for rank in plan.topology.members:
            self._ranks.send(rank, configure)
        self._events(
            "configure",
            {"epoch": state.epoch, "reason": plan.reason, "migrated": record.migrated},
        )
        now = self._clock()
        record.phases["migrate"] = now - began
        deadline = now + self._policy.resume_timeout_s
        self.state = Resuming(plan, deadline, now, record, set(plan.topology.members))

    def on_resumed(self, resumed: Resumed, now: float) -> Finished | None:
        """A member has met all others in the new domain."""
        state = self.state
        if not isinstance(state, Resuming) or resumed.epoch != state.plan.topology.epoch:
            return None
        state.waiting.discard(resumed.rank)
        state.domain_s = max(state.domain_s, resumed.domain_s)
        if state.waiting:
            return None
        record = state.record
        record.phases["domain"] = state.domain_s
        record.phases["resume"] = max(0.0, now - state.configured - state.domain_s)
        record.outcome, record.finished = "recovered", now
        self.state = Idle()
        return Recovered(state.plan, record)

    def overdue(self, now: float) -> list[Fault] | None:
        """What to begin again with once the present stage has missed its deadline; None before.

        A fence is answered by each rank for itself: whoever did not is a fault. In the resume
        stage all wait for the one that is stuck, so nobody is accused: the next fence finds it.
        """
        state = self.state
        if isinstance(state, Idle) or now < state.deadline:
            return None
        if isinstance(state, Resuming):
            return []
        detail = "the fence was not answered within its deadline"
        return [Fault(rank, "fence_timeout", detail) for rank in sorted(state.waiting)]

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long: nobody else is late by that."""
        if not isinstance(self.state, Idle):
            self.state.deadline += seconds


def _at_epoch(topology: Topology, epoch: Epoch) -> Topology:
    """Compound faults raise the epoch more than once before a plan is carried out."""
    return Topology(
        epoch=epoch,
        members=topology.members,
        attention=topology.attention,
        experts=topology.experts,
    )
