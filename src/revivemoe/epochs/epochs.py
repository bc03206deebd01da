"""The present membership, and the way to the next one. Read this first.

    signals (reports, exits, time) --> accuse, redo --> coordinator: fence .. resume --> a new epoch
    whoever plans a change ----------> change ----------^

Meets its host, which owns the sequences, only through `ports`. Synchronous; the time is passed in.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from revivemoe.epochs.attempts import Attempts
from revivemoe.epochs.coordinator import Coordinator
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.loads import Loads
from revivemoe.epochs.outlook import Outlook
from revivemoe.epochs.ports import SequenceOwner
from revivemoe.epochs.rank_life import Ready, Switching
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.stages import Failed, Finished, Recovered
from revivemoe.epochs.stall import StallClock
from revivemoe.epochs.state import (
    FailedState,
    Paused,
    Recovering,
    Serving,
    Starting,
    State,
    state_name,
)
from revivemoe.ids import Epoch, RankId
from revivemoe.membership.membership import Membership
from revivemoe.messages.commands import Configure, Fence, Stop
from revivemoe.messages.events import InstanceFailed, RecoveryEnded, StateEntered, Tell
from revivemoe.messages.reports import FenceAck, Resumed
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue, RecoveryPlan
from revivemoe.recovery.planner import plan_recovery
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repeats import Numbers
from revivemoe.recovery.symptoms import Symptoms
from revivemoe.recovery.world import World

log = logging.getLogger("revivemoe.epochs")

KEPT_RECORDS = 100
LAST_EPOCH = Epoch(1 << 40)
"""No epoch comes after it: a fence to it ends a rank's part in the instance."""


class Epochs:
    """Who is in, now and next."""

    def __init__(
        self,
        policy: Policy,
        membership: Membership,
        fleet: Fleet,
        host: SequenceOwner,
        clock: Callable[[], float],
        tell: Tell,
    ) -> None:
        """`membership`: of the first epoch. `clock` only times the stages."""
        self.policy, self.membership = policy, membership
        self.home = membership.topology
        """What the instance was started with: ranks come back to their roles."""
        self.state: State = Starting()
        self.fleet = fleet
        self.loads = Loads(fleet.send, fleet.lives.obligations, policy, tell)
        self.coordinator = Coordinator(fleet, self.restart, host, policy, clock, tell)
        self.attempts = Attempts(policy)
        parts = (fleet, self.loads, self.coordinator, self.attempts)
        self._outlook = Outlook(self.home, *parts)
        self.stall = StallClock()
        self.records: deque[RecoveryRecord] = deque(maxlen=KEPT_RECORDS)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Recoveries by cause and outcome."""
        self.lost_switch = False
        """A rank that was switching roles is gone: another one may take over."""
        self._host, self._clock, self._tell = host, clock, tell
        self.symptoms = Symptoms(policy)
        self.numbers = Numbers(policy.repeat_window_s)
        self.stopping = False
        fleet.lives.on_late = self._late
        fleet.on_launch = self.coordinator.renewed
        fleet.lives.on_not_coming = self.replan
        self.changing_role: RankId | None = None
        """The rank whose role the planned change under way is to change."""

    # ---- life --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask every living rank to exit. The fence frees those that wait for each other.

        From here on nothing is judged: that ranks end is what was asked for.
        """
        self.stopping = True
        for view in self.fleet.views.values():
            if not view.dead:
                self.fleet.send(view.rank, Fence(LAST_EPOCH))
                self.fleet.send(view.rank, Stop())
        self.fleet.lives.close(self._clock(), in_good_order=True)

    @property
    def over(self) -> bool:
        """Whether nothing is to come back any more."""
        return self.stopping or isinstance(self.state, FailedState)

    @property
    def serving(self) -> bool:
        return isinstance(self.state, Serving)

    @property
    def quiet(self) -> bool:
        """Whether a planned change may begin."""
        return isinstance(self.state, Serving) and not self.coordinator.active

    def fail(self, reason: str, user_error: bool = False) -> None:
        """The end. From here on nothing changes any more."""
        if isinstance(self.state, FailedState):
            return
        log.error("failed: %s", reason)
        self._enter(FailedState(reason, user_error))
        self._tell(InstanceFailed(reason, self._host.failed(reason)))
        self.fleet.lives.close(self._clock())

    # ---- the way to the next epoch -----------------------------------------------------------

    def accuse(self, faults: Sequence[Fault], now: float) -> None:
        """These ranks are out, as of now. Without any: the same members, a new domain."""
        missed = [f for f in faults if self.matters(f.rank)]
        for fault in faults:
            self._condemn(fault)
        if faults and not missed:
            return
        self._recover(faults, faults[0].kind if faults else "communication", now)

    def _late(self, fault: Fault, now: float) -> None:
        """A process has missed a deadline of its life. While a change is under way, or held, its
        stages have deadlines of their own: whoever is ready waits for that.
        """
        view = self.fleet.views[fault.rank]
        assert not view.member, f"rank {fault.rank} is a member, and owes nothing"
        if view.ready and self.coordinator.active:
            self.fleet.lives.on_ready(view, now)
        else:
            self.accuse([fault], now)

    def redo(self, cause: str, now: float, *, asked: bool = False) -> None:
        """Nobody is accused: the step is undone and done again in a new domain. `asked`: by an
        operator or a device, which is no attempt that may be in vain.
        """
        if asked and not self.coordinator.active:
            self.attempts.planned()
        elif self.coordinator.active and not asked:
            self.attempts.again(now)
        self._recover([], cause, now, counts=not asked)

    def change(
        self,
        faults: Sequence[Fault],
        cause: str,
        now: float,
        *,
        hold: bool = False,
        request_id: str | None = None,
        switch: RankId | None = None,
    ) -> None:
        """A planned change: all stop together at a step boundary. Ranks of `faults` go out, and
        `switch` becomes an expert rank. `hold`: stay there until `release`.
        """
        assert self.quiet, f"no planned change can begin: {self.state}"
        self.changing_role = switch
        self.symptoms.explained()
        self.attempts.planned()
        self.coordinator.begin_at_boundary(self.membership, faults, now, cause, hold)
        self.coordinator.record.request_id = request_id
        self._leave_epoch(now)

    def release(self, now: float) -> None:
        """End a pause, or one that is about to begin."""
        self.coordinator.release()
        if isinstance(self.state, Paused):
            self._enter(Recovering())
            self.proceed(now)

    def meet(self) -> None:
        """All have loaded: let them meet in the first epoch."""
        configure = Configure(0, self.membership, self.fleet.domain(), self.fleet.wakes)
        self.fleet.broadcast(self.membership.members, configure)

    def begin(self, exited: Fault | None, now: float) -> None:
        """All have met. One that exited just after that is a fault like any later one."""
        alive = [rank for rank in self.membership.members if not self.fleet.views[rank].dead]
        self.fleet.enter_epoch(self.membership.epoch, alive, now)
        self._enter(Serving())
        if exited is not None:
            self.accuse([exited], now)
        else:
            self._host.epoch_began(self.membership, None)

    def on_ack(self, ack: FenceAck, now: float) -> None:
        """A survivor has left and rolled back."""
        self.coordinator.on_ack(ack)
        self.proceed(now)

    def on_resumed(self, resumed: Resumed, now: float) -> None:
        """A member has met all others in the new domain."""
        if (finished := self.coordinator.on_resumed(resumed, now)) is not None:
            self._finish(finished, now)

    def recompiled(self, count: int) -> None:
        """A rank has compiled graphs: counted with the change of epoch that came last."""
        if self.coordinator.active:
            self.coordinator.record.recompiled += count
        elif self.records:
            self.records[-1].recompiled += count

    def is_present(self, epoch: Epoch) -> bool:
        """Whether something seen in `epoch` matters: one that is being left does not."""
        plan = self.coordinator.plan
        if self.coordinator.active and plan is None:
            return False
        return epoch == (plan.membership if plan is not None else self.membership).epoch

    def matters(self, rank: RankId) -> bool:
        """Whether a loss of this rank changes what the instance has to do."""
        plan = self.coordinator.plan
        configured = plan.membership.members if plan is not None else ()
        return self.coordinator.active or rank in (*self.membership.members, *configured)

    def _condemn(self, fault: Fault) -> None:
        view = self.fleet.views[fault.rank]
        if fault.rank in self.fleet.switched and isinstance(view.life, Switching | Ready):
            self.lost_switch = True
            if fault.signature:  # the next donor would end in the same way
                self.attempts.load_failed(self._clock())
        self.fleet.condemn(fault, self._clock())
        self.numbers.forget(fault.rank)
        self.loads.forget(fault.rank)
        self._host.lost(fault.rank, fault)

    def _recover(
        self, faults: Sequence[Fault], cause: str, now: float, *, counts: bool = True
    ) -> None:
        assert not isinstance(self.state, FailedState | Starting), f"no way back from {self.state}"
        if counts:
            self.attempts.recovery(now, self.coordinator.active)
        self.changing_role = None
        self.symptoms.explained()
        absent = [r for r, v in self.fleet.views.items() if not v.ready]
        self.coordinator.begin(self.membership, faults, now, cause=cause, absent=absent)
        self._leave_epoch(now)

    def _leave_epoch(self, now: float) -> None:
        self._host.epoch_left()
        self.stall.begin(self.coordinator.record, self._host.busy)
        self._enter(Recovering())
        self.proceed(now)

    def proceed(self, now: float) -> None:
        """Whatever the change under way waited for may be there."""
        coordinator = self.coordinator
        if coordinator.holding:
            self._enter(Paused())
            return
        if coordinator.fenced and (fault := self.numbers.settle(now)) is not None:
            self._condemn(fault)
            coordinator.add_fault(fault)
        carried_out, fleet = coordinator.plan, self.fleet
        finished = coordinator.proceed(lambda: self.world(now), fleet.domain(), fleet.wakes)
        plan = coordinator.plan
        if finished is not None:
            self._finish(finished, now)
        elif plan is not None and plan is not carried_out:
            self._carry_out(plan)

    def replan(self, now: float) -> None:
        """Ranks that the change under way may have waited for do not come."""
        if self.coordinator.active:
            self.proceed(now)

    def _carry_out(self, plan: Continue) -> None:
        asked, self.changing_role = self.changing_role, None
        for switch in plan.switches:
            self.coordinator.held.pop(switch.rank, None)  # told of another role
            by = self.coordinator.record.request_id if switch.rank == asked else None
            self.fleet.switch(switch, plan.switch_aside, by, self._clock())
        self._retire_leavers(plan.membership)
        for rank in sorted({*self.membership.attention} - {*plan.membership.attention}):
            self._host.lost(rank, None)  # what was not moved, such as a suspect, has no rank now
        self._host.planned(plan)

    def _retire_leavers(self, membership: Membership) -> None:
        """Members that the plan leaves out have been told to stop: their exit is no fault."""
        for rank in self.membership.members:
            view = self.fleet.views[rank]
            if rank not in membership.members and view.ready:
                self.fleet.lives.dismiss(view, self._clock())
                self.loads.forget(rank)

    def _finish(self, finished: Finished, now: float) -> None:
        record = finished.record
        assert record.outcome is not None, "a recovery ended without an outcome"
        self.records.append(record)
        self.outcomes[record.cause, record.outcome] += 1
        ended = (record.epoch, record.cause, record.outcome, record.reason, record.request_id)
        self._tell(RecoveryEnded(*ended))
        match finished:
            case Recovered(plan=plan):
                self._begin_epoch(plan)
            case Failed(reason=reason):
                self.fail(reason)

    def _begin_epoch(self, plan: Continue) -> None:
        assert plan.membership.epoch > self.membership.epoch, "epochs only grow"
        self.attempts.domain_failures = 0
        self.membership = plan.membership
        self.fleet.enter_epoch(plan.membership.epoch, plan.membership.members, self._clock())
        if not self._host.busy:
            self.attempts.forward()  # no step is to be expected
        log.info("epoch %d: %s", plan.membership.epoch, self.records[-1].reason)
        self._enter(Serving())
        self._host.epoch_began(self.membership, self.records[-1])
        home, redundancy = self.fleet.home, self.policy.restore_redundancy
        self.loads.epoch_began(plan, home, redundancy, self._clock())

    def restart(self, rank: RankId) -> None:
        """A new process for a rank, once the present one is gone."""
        now, view = self._clock(), self.fleet.views[rank]
        assert self.coordinator.active, f"rank {rank} is restarted outside of a recovery"
        delay_s = self.attempts.restarted(self.coordinator.record.epoch, now)
        if not view.dead:
            self.fleet.end(view, now)
            self.loads.forget(rank)
            self._host.lost(rank, None)
        self.fleet.lives.replace(rank, now, delay_s)

    # ---- what would be done ------------------------------------------------------------------

    def plan_for(self, faults: Sequence[Fault]) -> RecoveryPlan:
        """What would be done about these faults now. Does nothing."""
        return plan_recovery(self.world(self._clock()), faults, self.policy)

    def plan_switch(self, rank: RankId) -> RecoveryPlan:
        """What would be done for the role switch of a rank now. Does nothing."""
        return plan_recovery(replace(self.world(self._clock()), switch=rank), [], self.policy)

    def world(self, now: float) -> World:
        """Everything the plan depends on."""
        return self._outlook.world(self.membership, self._host, self.changing_role, now)

    def _enter(self, state: State) -> None:
        assert not isinstance(self.state, FailedState), "a failed instance stays so"
        self.state = state
        self._tell(StateEntered(state_name(state), self.membership.epoch))
