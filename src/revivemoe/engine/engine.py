"""Read this first: the engine of one instance. It wires everything and decides nothing alone.

    reports, exits, health, time --> detector --> coordinator (recovery) --> ranks
    submissions -------------------> ledger (token logs, owners) ----------> ranks, streams
    operators, drains -------------> maintenance (planned changes) --> coordinator

The engine is synchronous and takes the time as an argument; `serving` drives it with asyncio and
real processes, the simulation and the tests with neither.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, assert_never

from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.device_watch import DeviceWatch
from revivemoe.engine.ledger import (
    Assigned,
    Ledger,
    LiveRequest,
    Sink,
)
from revivemoe.engine.maintenance import Maintenance
from revivemoe.engine.suspects import strike
from revivemoe.engine.totals import Totals
from revivemoe.epochs.coordinator import (
    Coordinator,
    Failed,
    Finished,
    Recovered,
    Restarting,
)
from revivemoe.epochs.fleet import Cluster as Cluster
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.rank_life import RankView
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.state import (
    FailedState,
    Paused,
    Recovering,
    Serving,
    Starting,
    State,
)
from revivemoe.epochs.state import state_name as state_name
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.membership.topology import Topology
from revivemoe.messages.reports import (
    Command,
    Configure,
    ExpertsLoaded,
    Fatal,
    Fence,
    FenceAck,
    Heartbeat,
    Hello,
    Inject,
    NonFinite,
    RankStats,
    Ready,
    Report,
    Resumed,
    StepAborted,
    Stop,
    Tokens,
    Wake,
)
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.planner import (
    RecoveryPlan,
    World,
    describe_plan,
    plan_recovery,
    refuse_switch,
)
from revivemoe.recovery.repeats import Numbers
from revivemoe.recovery.symptoms import Symptoms
from revivemoe.streams import EngineUnavailable, Submission

log = logging.getLogger("revivemoe.engine.engine")

KEPT_RECORDS = 100
LAST_WORDS_S = 0.5
"""How long the last words of a rank that ended while starting may take to arrive."""
TICK_GAP_S = 0.25
"""A longer time between two ticks is a stall of the engine itself, which excuses the ranks."""
OWN_STALL_S = 1.0
"""After one longer than this, nobody is judged before the next tick."""
LAST_EPOCH = Epoch(1 << 40)
"""No epoch comes after it: a fence to it ends a rank's part in the instance."""


class Engine:
    """One instance: its membership, its requests, its state."""

    def __init__(
        self,
        config: EngineConfig,
        topology: Topology,
        placement: ExpertPlacement,
        vocabulary: Vocabulary,
        cluster: Cluster,
        clock: Callable[[], float],
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        dense: DenseGroups | None = None,
    ) -> None:
        """`dense`: groups that share the dense layers, if they are shared."""
        assert config.max_model_len is not None, "the config is resolved beforehand"
        policy = config.policy
        self.config, self.topology, self.placement = config, topology, placement
        self.dense = dense
        self.home = topology
        """What the instance was started with: ranks come back to their roles."""
        self.missing = placement.missing()
        """Experts that no rank holds, of the present placement."""
        devices = {rank: config.rank_device(rank) for rank in topology.members}
        self.fleet = Fleet(cluster, placement, devices, policy, self.event)
        self.ranks, self.detector = self.fleet.views, self.fleet.detector
        self.ledger = Ledger(
            vocabulary, config.max_model_len, self.fleet.send, self.fleet.incarnation
        )
        self.coordinator = Coordinator(self, self.ledger, policy, clock, self.event)
        self.maintenance = Maintenance(self)
        self.devices = DeviceWatch(self)
        self.records: deque[RecoveryRecord] = deque(maxlen=KEPT_RECORDS)
        self.totals = Totals()
        self.state: State = Starting(float("inf"), set())
        self.last_step = 0
        self.last_ft_request_id: str | None = None
        self._cluster, self._clock, self._on_event = cluster, clock, on_event
        self._symptoms = Symptoms(policy)
        self._numbers = Numbers(policy.repeat_window_s)
        self._wake = 0
        self._last_commit: float | None = None
        self._unresumed: RecoveryRecord | None = None
        """A recovery whose first step in the new epoch has not been seen."""
        self._stopping = False
        self._last_tick = clock()
        self._starts: deque[float] = deque(maxlen=256)
        """When recent recoveries began."""
        self._restarts: dict[Epoch, float] = {}
        """When ranks were restarted, by the epoch it was for."""
        self._counted = False
        """Whether the recovery under way counts towards the policy's limit."""
        self._domain_failures = 0
        self._switch: RankId | None = None
        """The rank whose role the planned change under way is to change."""
        self._load_failed_at: float | None = None
        """When experts last could not be loaded before a resume."""

    # ---- life --------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Launch every rank."""
        members = self.topology.members
        self.state = Starting(now + self.config.start_timeout_s, set(members))
        for rank in members:
            self.fleet.launch(rank, now)
        self.fleet.enter_epoch(members)

    def stop(self) -> None:
        """Ask every living rank to exit. The fence frees those that wait for each other.

        From here on nothing is judged: that ranks end is what was asked for.
        """
        self._stopping = True
        for view in self.ranks.values():
            if not view.dead:
                self.fleet.send(view.rank, Fence(LAST_EPOCH))
                self.fleet.send(view.rank, Stop())

    def tick(self, now: float) -> None:
        """Judge deadlines. Called a few times a second, after the inbox has been drained.

        After a long stall of its own the engine judges nobody in this tick; after any, it moves
        the deadlines.
        """
        stalled_s = self._own_stall_s(now)
        if stalled_s:
            self.coordinator.postpone(stalled_s)
            self.detector.postpone(stalled_s)
            self.maintenance.postpone(stalled_s)
            self._symptoms.postpone(stalled_s)
        if stalled_s > OWN_STALL_S:
            self.event("engine_stalled", {"seconds": stalled_s})
            return
        match self.state:
            case Starting(deadline=deadline) if now > deadline:
                slow = sorted(r for r, v in self.ranks.items() if not v.ready)
                self._fail(f"ranks {slow} did not start within {self.config.start_timeout_s:.0f} s")
            case Starting(exited=Fault() as fault, exited_at=at) if now - at > LAST_WORDS_S:
                self._fail_start(fault)
            case Serving() | Recovering() | Paused():
                self._judge(now)
            case _:
                pass

    def _own_stall_s(self, now: float) -> float:
        """How long the engine itself stood still before this tick, seconds."""
        gap_s, self._last_tick = now - self._last_tick, now
        return gap_s if gap_s > TICK_GAP_S else 0.0

    def _judge(self, now: float) -> None:
        if faults := self.fleet.judge(now):
            self.accuse(faults, now)
        elif (overdue := self.coordinator.overdue(now)) is not None:
            self._overdue(overdue, now)
        elif self._symptoms.unexplained(now):
            self._blame_link(now)
        else:
            self._look_after(now)

    def _look_after(self, now: float) -> None:
        """Nobody is accused: what else is due."""
        if self.ledger.num_waiting:  # a suspect whose turn has come without a token to tell of it
            self.assign()
        if self.fleet.give_up_corpses(now):
            self._proceed(now)
        for fault in self.fleet.newly_slow(now):
            if self.config.policy.isolate_slow:
                self.maintenance.drain(fault, now)
        self.maintenance.tick(now)

    def _overdue(self, faults: list[Fault], now: float) -> None:
        """A stage has missed its deadline: begin again from the fence, which is a new attempt."""
        if self.coordinator.plan is not None:
            self._domain_failures += 1
        if isinstance(self.coordinator.state, Restarting):
            detail = f"it was not ready within {self.config.policy.restart_timeout_s:.0f} s"
            late = [v.rank for v in self.ranks.values() if v.loading]
            faults = [Fault(rank, "start_timeout", detail) for rank in late]
        if self.coordinator.record.cause != "pause":
            self._starts.append(now)
        self.accuse(faults, now)

    def _blame_link(self, now: float) -> None:
        """Communication failed and nobody is accused: a new domain, or one of the two goes."""
        if self.coordinator.active:
            self._starts.append(now)
            self._domain_failures += self.coordinator.plan is not None
        self.accuse(self._symptoms.blame(now), now)

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, submission: Submission, sink: Sink) -> LiveRequest:
        """Admit a request. While starting or recovering its sequences wait for a rank.

        Raises EngineUnavailable once the instance has failed.
        """
        if isinstance(self.state, FailedState):
            raise EngineUnavailable(f"the instance has failed: {self.state.reason}")
        request = self.ledger.admit(submission, sink, self.degraded)
        self.totals.prompt_tokens += sum(len(p) for p in submission.prompts)
        self.assign()
        return request

    def abort(self, request: LiveRequest) -> None:
        """The client is gone."""
        self.ledger.abort(request)

    @property
    def degraded(self) -> bool:
        """Whether experts are missing."""
        return bool(self.missing)

    def assign(self) -> None:
        """While serving: give every sequence that waits for a rank to one."""
        if not isinstance(self.state, Serving):
            return
        ranks = [r for r in self.topology.attention if not self.ranks[r].draining]
        assigned = self.ledger.assign_waiting(ranks or self.topology.attention)
        orphans = [one for one in assigned if one.orphan]
        if orphans:
            self._count_moved(orphans)
        if assigned:
            self.wake()

    def _count_moved(self, orphans: Sequence[Assigned]) -> None:
        """Suspects that have lost their rank move one by one, after the recovery itself."""
        tokens = sum(one.num_tokens for one in orphans)
        self.totals.migrated += len(orphans)
        self.totals.recomputed_tokens += tokens
        if self.records:
            self.records[-1].migrated += len(orphans)
            self.records[-1].recomputed_tokens += tokens
        self.tell_migrated([one.seq_id for one in orphans])

    def tell_migrated(self, moved: Sequence[SeqId]) -> None:
        """Name the requests that go on elsewhere."""
        requests = [self.ledger.request_id(seq_id) for seq_id in moved]
        self.event("migrated", {"epoch": self.topology.epoch, "requests": requests})

    def wake(self) -> None:
        """Tell all members that there is work."""
        self._wake += 1
        for rank in self.topology.members:
            self.fleet.send(rank, Wake(self._wake))

    # ---- what ranks report -------------------------------------------------------------------

    def on_report(self, report: Report, now: float) -> None:
        """Take one message of a rank's present process; those of the accused are dropped."""
        view = self.ranks.get(report.rank)
        if view is None or report.incarnation != view.incarnation or view.dead:
            return
        self.detector.heard(report.rank, report.incarnation, now)
        match report:
            case Hello():
                view.pid, view.host = report.pid, report.host
            case Ready():
                self._on_ready(view, report, now)
            case Heartbeat():
                self.fleet.on_heartbeat(report)
            case Tokens():
                self._on_tokens(report, now)
            case FenceAck():
                self.coordinator.on_ack(report)
                self._proceed(now)
            case Resumed():
                self._on_resumed(report, now)
            case StepAborted():
                self._on_symptom(report, now)
            case NonFinite():
                self._on_non_finite(report, now)
            case ExpertsLoaded():
                self._on_experts_loaded(report, now)
            case Fatal():
                self._on_fatal(view, report)
            case _:
                assert_never(report)

    def on_exit(
        self,
        rank: RankId,
        incarnation: Incarnation,
        detail: str,
        now: float,
        *,
        by_itself: bool = False,
    ) -> None:
        """A rank's process is gone: the one signal that accuses by itself.

        `by_itself`: it crashed, rather than that somebody killed it.
        """
        fault = self.detector.exited(rank, incarnation, detail, now)
        if fault is None:
            return
        view = self.ranks[rank]
        if self._stopping or isinstance(self.state, FailedState):
            view.condemn(None)
        elif view.dead:
            if view.restart_when_gone:
                self.fleet.launch(rank, now)
        elif isinstance(self.state, Starting):
            self._on_exit_at_start(self.state, view, fault, now)
        else:
            if by_itself or view.last_words:
                said = view.last_words or detail
                fault = replace(fault, detail=said, signature="process_exit")
            self.accuse([fault], now)

    def _on_exit_at_start(self, state: Starting, view: RankView, fault: Fault, now: float) -> None:
        view.fault = fault
        if state.exited is None:
            state.exited, state.exited_at = fault, now
        if view.last_words:
            self._fail_start(fault)

    def on_forkserver_gone(self) -> None:
        """Its ranks live on. Only ranks that are still to start need it."""
        self.event("forkserver_gone", {})
        if isinstance(self.state, Starting) and not all(v.ready for v in self.ranks.values()):
            self._fail("the fork server ended while ranks were starting")

    def on_health(self, report: DeviceReport, now: float) -> None:
        """A monitor tells of a rank's device; the policy says what that asks for."""
        if not self._stopping:
            self.devices.on_report(report, now)

    def fail(self, reason: str) -> None:
        """An error of the engine's own host: nothing can be relied upon."""
        if not isinstance(self.state, FailedState):
            self._fail(reason)

    def inject(self, fault: Inject, rank: RankId) -> None:
        """Hand a fault to a living rank. Raises ValueError if there is none of that id."""
        view = self.ranks.get(rank)
        if view is None or view.dead:
            raise ValueError(f"id {rank} is not a living rank")
        if fault.step is not None and fault.step <= self.last_step:
            raise ValueError(f"step {fault.step} is past: the instance is at {self.last_step}")
        self.fleet.send(rank, fault)

    def what_if(self, ranks: list[RankId]) -> dict[str, Any]:
        """The plan for the loss of these ranks now; does nothing. Raises ValueError."""
        for rank in ranks:
            if rank not in self.topology.members:
                raise ValueError(f"id {rank} is not a member of epoch {self.topology.epoch}")
        faults = [Fault(rank, "whatif", "asked by an operator") for rank in ranks]
        return describe_plan(self.plan_for(faults))

    def plan_for(self, faults: Sequence[Fault]) -> RecoveryPlan:
        """What would be done about these faults now. Does nothing."""
        return plan_recovery(self._world(self._clock()), faults, self.config.policy)

    def _on_ready(self, view: RankView, ready: Ready, now: float) -> None:
        log.info(
            "rank %d ready on %s: %d KV blocks, weights in %.2f s",
            view.rank, ready.device, ready.kv_blocks_total, ready.load_s,
        )  # fmt: skip
        view.ready, view.maskable = True, ready.maskable
        view.stats = RankStats(kv_blocks_total=ready.kv_blocks_total)
        if ready.load_sources:
            self._tell_loaded(view.rank, ready.load_s, ready.load_bytes, ready.load_sources)
        if not isinstance(self.state, Starting):
            self.event("ready", {"id": view.rank, "incarnation": view.incarnation})
            self._proceed(now)
        elif all(v.ready for v in self.ranks.values()):
            configure = Configure(
                epoch=self.topology.epoch,
                step=0,
                topology=self.topology,
                placement=self.placement,
                domain=self._cluster.domain(),
                wake=self._wake,
                dense=self.dense,
            )
            for rank in self.topology.members:
                self.fleet.send(rank, configure)

    def _tell_loaded(
        self, rank: RankId, seconds: float, num_bytes: int, sources: dict[str, int]
    ) -> None:
        told = {"id": rank, "seconds": seconds, "bytes": num_bytes, "sources": sources}
        self.event("loaded", told)

    def _on_tokens(self, report: Tokens, now: float) -> None:
        arrival = self.ledger.on_tokens(report)
        self.totals.count_tokens(arrival, report.step_s)
        record = self._unresumed
        if record is None:
            pass
        elif report.epoch < record.epoch:
            record.last_old_step = now
        elif record.first_new_step is None:
            record.first_new_step = now
            self._unresumed = None
        self._last_commit = now
        self.last_step = max(self.last_step, report.step)
        self.devices.reached(self.last_step, now)
        if arrival.released and self.ledger.num_waiting:
            self.assign()

    def _on_resumed(self, report: Resumed, now: float) -> None:
        if isinstance(self.state, Starting):
            self.state.waiting.discard(report.rank)
            if not self.state.waiting:
                self._begin_serving(self.state.exited, now)
            return
        if report.experts_loaded:
            self._tell_loaded(
                report.rank, report.experts_s, report.experts_bytes, report.experts_sources
            )
        finished = self.coordinator.on_resumed(report, now)
        if finished is not None:
            self._finish(finished, now)

    def _begin_serving(self, exited: Fault | None, now: float) -> None:
        """All have met. One that exited just after that is a fault like any later one."""
        self._enter(Serving())
        if exited is not None:
            self.accuse([exited], now)
        else:
            self.assign()

    def _of_present_epoch(self, epoch: Epoch) -> bool:
        """Whether something seen in `epoch` matters: one that is being left does not."""
        plan = self.coordinator.plan
        if self.coordinator.active and plan is None:
            return False
        return epoch == (plan.topology.epoch if plan is not None else self.topology.epoch)

    def _on_symptom(self, report: StepAborted, now: float) -> None:
        self.totals.symptoms += 1
        self.event("symptom", {"id": report.rank, "detail": report.detail})
        if isinstance(self.state, Starting):
            self._fail(f"the ranks could not meet: {report.detail}")
        elif self._of_present_epoch(report.epoch):
            self._symptoms.reported(report.rank, now)

    def _on_non_finite(self, report: NonFinite, now: float) -> None:
        """Redo the step. Whom to blame is clear when all have left it: no later claim comes."""
        where = f"{report.phase}, layer {report.layer}"
        told = {"id": report.rank, "where": where, "produced_here": report.produced_here}
        self.event("non_finite", told)
        self._numbers.claim(report)
        if not isinstance(self.state, Starting) and self._of_present_epoch(report.epoch):
            self.redo("non_finite", now)

    def _on_fatal(self, view: RankView, report: Fatal) -> None:
        lines = report.detail.strip().splitlines()
        view.last_words = lines[-1] if lines else ""
        if report.user_error and isinstance(self.state, Starting):
            self._fail(view.last_words, user_error=True)

    # ---- recovery ----------------------------------------------------------------------------

    def accuse(self, faults: Sequence[Fault], now: float) -> None:
        """These ranks are out, as of now. Without any: the same members, a new domain."""
        outside = [f for f in faults if not self._matters(f.rank)]
        for fault in faults:
            self._condemn(fault)
        for fault in outside:  # nobody misses them
            self.fleet.kill(fault.rank)
        if faults and len(outside) == len(faults):
            return
        self._recover(faults, faults[0].kind if faults else "communication", now)

    def redo(self, cause: str, now: float) -> None:
        """Nobody is accused: the step is undone and done again in a new domain."""
        if self.coordinator.active:
            self._starts.append(now)
        self._recover([], cause, now)

    def _matters(self, rank: RankId) -> bool:
        """Whether a loss of this rank changes what the instance has to do."""
        plan = self.coordinator.plan
        configured = plan.topology.members if plan is not None else ()
        return self.coordinator.active or rank in (*self.topology.members, *configured)

    def _condemn(self, fault: Fault) -> None:
        aside = fault.rank in self.fleet.switched and fault.rank not in self.topology.members
        if aside and not self.ranks[fault.rank].dead:
            self.maintenance.switch_failed()
        self.fleet.condemn(fault, self._clock())
        self._numbers.forget(fault.rank)
        self.maintenance.forget(fault.rank)
        self._orphan(fault)

    def _orphan(self, fault: Fault) -> None:
        """The rank's sequences need another one; those that may have brought it down are tried."""
        victims = self.ledger.orphan(fault.rank)
        if not fault.signature:
            return
        convicted = strike(victims, fault.signature)
        if convicted is not None:
            self.totals.convicted += 1
            request_id = convicted.submission.request_id
            self.event("convicted", {"request": request_id, "detail": fault.detail})
            self.ledger.convict(
                convicted,
                "this request was running at two faults of the same kind, the second time alone: "
                f"it is ended to protect the others (rank {fault.rank}: {fault.detail})",
            )

    def _recover(self, faults: Sequence[Fault], cause: str, now: float) -> None:
        if not (self.coordinator.active and self._counted):
            self._starts.append(now)
            self._counted = True
        self._switch = None
        absent = [r for r, v in self.ranks.items() if not v.ready]
        self._symptoms.explained()
        self.maintenance.interrupt()
        self.coordinator.begin(self.topology, faults, now, cause=cause, absent=absent)
        self._await_first_step()
        self._enter(Recovering())
        self._proceed(now)

    def change_epoch(
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
        `switch` becomes an expert rank.
        """
        self._switch = switch
        self._symptoms.explained()
        self._counted = False
        self.coordinator.begin_at_boundary(self.topology, faults, now, cause, hold)
        self.coordinator.record.request_id = request_id
        self._await_first_step()
        self._enter(Recovering())
        self._proceed(now)

    def _await_first_step(self) -> None:
        """Time the stall, if anybody has work."""
        busy = self.ledger.num_unfinished > 0
        record = self.coordinator.record
        if record.last_old_step is None and busy:
            record.last_old_step = self._last_commit
        self._unresumed = record if busy else None

    def _proceed(self, now: float) -> None:
        coordinator = self.coordinator
        if coordinator.holding:
            self._enter(Paused())
            return
        if coordinator.fenced and (fault := self._numbers.settle(now)) is not None:
            self._condemn(fault)
            coordinator.add_fault(fault)
        carried_out = coordinator.plan
        finished = coordinator.proceed(lambda: self._world(now), self._cluster.domain(), self._wake)
        plan = coordinator.plan
        if finished is not None:
            self._finish(finished, now)
        elif plan is not None and plan is not carried_out:
            self._switch = None
            for switch in plan.switches:
                self.fleet.switch(switch, plan.switch_aside)
            self._retire_leavers(plan.topology)
            if plan.placement.missing():
                self.ledger.mark_degraded()
            self.tell_migrated([m.seq_id for m in plan.migrations])

    def release(self, now: float) -> None:
        """End a pause."""
        self.coordinator.release()
        self._enter(Recovering())
        self._proceed(now)

    def _world(self, now: float) -> World:
        policy, fleet = self.config.policy, self.fleet
        horizon = now - policy.window_s
        loaded, loading = self.maintenance.reloads()
        joining = fleet.joining
        return World(
            topology=self.topology,
            placement=self.placement,
            sequences=self.ledger.unfinished(),
            maskable=all(view.maskable for view in self.ranks.values()),
            recent_recoveries=self._recent_recoveries(horizon),
            recent_restarts=sum(t >= horizon for t in self._restarts.values()),
            home=fleet.roles(self.home),
            gone=tuple(fleet.gone),
            ready=tuple(view.rank for view in joining),
            tables={view.rank: view.table for view in (*joining, *fleet.switching)},
            launching=tuple(fleet.launching),
            relaunchable=tuple(fleet.relaunchable(now)),
            loaded=loaded,
            loading=loading,
            domain_failures=self._domain_failures,
            trials=self.ledger.trials(),
            can_load=not self._load_failed_lately(now),
            home_placement=fleet.home,
            dense=self.dense,
            switched=dict(fleet.switched),
            switch=self._switch,
        )

    def refuse_switch(self, rank: RankId) -> str | None:
        """Why a rank cannot, or need not, become an expert rank; None: it can."""
        return refuse_switch(self._world(self._clock()), rank)

    def plan_switch(self, rank: RankId) -> RecoveryPlan:
        """What would be done for the role switch of a rank now. Does nothing."""
        world = replace(self._world(self._clock()), switch=rank)
        return plan_recovery(world, [], self.config.policy)

    def _recent_recoveries(self, horizon: float) -> int:
        """Without the one under way. A planned change is not measured by them."""
        if self.coordinator.active and not self._counted:
            return 0
        return sum(t >= horizon for t in self._starts) - int(self.coordinator.active)

    def _load_failed_lately(self, now: float) -> bool:
        at = self._load_failed_at
        return at is not None and now - at <= self.config.policy.repeat_window_s

    def _on_experts_loaded(self, report: ExpertsLoaded, now: float) -> None:
        if report.request or report.error is None:
            self.maintenance.on_loaded(report, now)
            return
        self.event("load_failed", {"id": report.rank, "detail": report.error})
        log.warning("rank %d could not load experts: %s", report.rank, report.error)
        self._load_failed_at = now
        if report.rank in self.fleet.switched:
            self.fleet.forget_table(report.rank)
        if not self._matters(report.rank):
            return
        self.redo(self.coordinator.record.cause if self.coordinator.active else "load", now)

    def restart(self, rank: RankId) -> None:
        """`RankPort`: a new process for a rank, once the present one is gone."""
        now = self._clock()
        view = self.ranks[rank]
        self._restarts.setdefault(self.coordinator.record.epoch, now)
        if not view.dead:
            view.condemn(None)
            self.maintenance.forget(rank)
            self.ledger.orphan(rank)
        self.fleet.replace(rank, now)

    def send(self, rank: RankId, command: Command) -> None:
        """`RankPort`."""
        self.fleet.send(rank, command)

    def kill(self, rank: RankId) -> None:
        """`RankPort`."""
        self.fleet.kill(rank)

    def _finish(self, finished: Finished, now: float) -> None:
        record = finished.record
        self.records.append(record)
        self.totals.count_recovery(record)
        self.event(
            "recovery",
            {
                "epoch": record.epoch,
                "cause": record.cause,
                "outcome": record.outcome,
                "reason": record.reason,
                "request_id": record.request_id,
            },
        )
        match finished:
            case Recovered(plan=plan):
                self._domain_failures = 0
                self.topology, self.placement = plan.topology, plan.placement
                self.dense = plan.dense
                self.missing = plan.placement.missing()
                if self.degraded:
                    self.ledger.mark_degraded()
                self.fleet.enter_epoch(plan.topology.members)
                log.info("epoch %d: %s", plan.topology.epoch, record.reason)
                self._enter(Serving())
                self.assign()
                self.maintenance.after(plan, now)
            case Failed(reason=reason):
                self._fail(reason)

    def _retire_leavers(self, topology: Topology) -> None:
        """Members that the plan leaves out have been told to stop: their exit is no fault."""
        for rank in self.topology.members:
            view = self.ranks[rank]
            if rank not in topology.members and view.ready:
                view.condemn(view.fault)
                self.maintenance.forget(rank)

    def _fail_start(self, fault: Fault) -> None:
        view = self.ranks[fault.rank]
        view.dead = True
        self._fail(f"rank {fault.rank} ended while starting: {view.last_words or fault.detail}")

    def _fail(self, reason: str, user_error: bool = False) -> None:
        log.error("failed: %s", reason)
        self._enter(FailedState(reason, user_error))
        ended = self.ledger.fail_all(f"the instance has failed: {reason}", 503)
        self.event("failed", {"reason": reason, "streams_ended": ended})
        for view in self.ranks.values():
            self.fleet.kill(view.rank)

    # ---- helpers -----------------------------------------------------------------------------

    def _enter(self, state: State) -> None:
        self.state = state
        self.event("state", {"state": state_name(state), "epoch": self.topology.epoch})

    def event(self, kind: str, detail: dict[str, Any]) -> None:
        """Tell whoever follows the events."""
        self._on_event({"event": kind, **detail})
