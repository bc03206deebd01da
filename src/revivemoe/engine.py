"""Read this first: the engine of one instance. It wires everything and decides nothing alone.

    reports, exits, time --> detector --> coordinator (recovery) --> ranks
    submissions ----------> ledger (token logs, owners) -----------> ranks, streams

The engine is synchronous and takes the time as an argument; `serving` drives it with asyncio and
real processes, the tests with neither.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Vocabulary
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.ledger import Arrival, Ledger, LiveRequest, Sink
from revivemoe.messages import (
    Command,
    Configure,
    DomainSpec,
    Fatal,
    Fence,
    FenceAck,
    Heartbeat,
    Hello,
    Inject,
    RankStats,
    Ready,
    Report,
    Resumed,
    StepAborted,
    Stop,
    Tokens,
    Wake,
)
from revivemoe.placement import ExpertPlacement
from revivemoe.recovery.coordinator import Coordinator, Failed, Finished, Recovered
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.planner import GiveUp, RecoveryPlan, World, plan_recovery
from revivemoe.recovery.record import RecoveryRecord
from revivemoe.streams import EngineUnavailable, Submission
from revivemoe.topology import Topology

log = logging.getLogger("revivemoe.engine")

KEPT_RECORDS = 100
LAST_WORDS_S = 0.5
"""How long the last words of a rank that ended while starting may take to arrive."""
OWN_STALL_S = 1.0
"""A longer time between two ticks means that the engine itself stood still."""
LAST_EPOCH = Epoch(1 << 40)
"""No epoch comes after it: a fence to it ends a rank's part in the instance."""


class Cluster(Protocol):
    """Starts ranks and reaches them. No call blocks, or fails because a rank is gone."""

    def launch(
        self, rank: RankId, incarnation: Incarnation, slots: tuple[tuple[int, ...], ...]
    ) -> None: ...

    def send(self, rank: RankId, command: Command) -> None: ...

    def kill(self, rank: RankId) -> None: ...

    def domain(self) -> DomainSpec:
        """How the members of the next epoch shall reach each other."""
        ...


@dataclass
class RankView:
    """What the engine knows of one rank for life."""

    rank: RankId
    incarnation: Incarnation
    device: str
    pid: int | None = None
    host: str = ""
    ready: bool = False
    dead: bool = False
    maskable: bool = True
    stats: RankStats = field(default_factory=RankStats)
    fault: Fault | None = None
    last_words: str = ""


@dataclass
class Starting:
    """Ranks load; then they meet for the first time."""

    deadline: float
    waiting: set[RankId]
    """Members that have not met the others yet."""
    exited: Fault | None = None
    """The first rank whose process has ended. Why, its last words may say."""
    exited_at: float = 0.0


@dataclass(frozen=True)
class Serving:
    pass


@dataclass(frozen=True)
class Recovering:
    pass


@dataclass(frozen=True)
class FailedState:
    """The end: an orchestrator restarts the instance."""

    reason: str
    user_error: bool = False


State = Starting | Serving | Recovering | FailedState


@dataclass
class Totals:
    """Counters since the start, for the metrics."""

    generation_tokens: int = 0
    prompt_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    recoveries: dict[tuple[str, str], int] = field(default_factory=dict)
    migrated: int = 0
    recomputed_tokens: int = 0
    symptoms: int = 0
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))


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
    ) -> None:
        assert config.max_model_len is not None, "the config is resolved beforehand"
        self.config, self.topology, self.placement = config, topology, placement
        self.missing = placement.missing()
        """Experts that no rank holds, of the present placement."""
        self.detector = Detector()
        self.ledger = Ledger(vocabulary, config.max_model_len, self._send, self._incarnation)
        self.coordinator = Coordinator(cluster, self.ledger, config.policy, clock, self._event)
        self.ranks: dict[RankId, RankView] = {
            rank: RankView(rank, Incarnation(1), config.rank_device(rank))
            for rank in topology.members
        }
        self.records: deque[RecoveryRecord] = deque(maxlen=KEPT_RECORDS)
        self.totals = Totals()
        self.state: State = Starting(float("inf"), set())
        self.last_step = 0
        self._cluster, self._clock, self._on_event = cluster, clock, on_event
        self._wake = 0
        self._last_commit: float | None = None
        self._unresumed: RecoveryRecord | None = None
        """A recovery whose first step in the new epoch has not been seen."""
        self._symptom_since: float | None = None
        self._stopping = False
        self._last_tick = clock()
        self._starts: deque[float] = deque(maxlen=256)
        """When recent recoveries began."""

    # ---- life --------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Launch every rank."""
        members = self.topology.members
        self.state = Starting(now + self.config.start_timeout_s, set(members))
        for rank in members:
            view = self.ranks[rank]
            self.detector.launched(rank, view.incarnation, now)
            slots = self.placement.slots.get(rank, ())
            self._cluster.launch(rank, view.incarnation, slots)

    def stop(self) -> None:
        """Ask every living rank to exit. The fence frees those that wait for each other.

        From here on nothing is judged: that ranks end is what was asked for.
        """
        self._stopping = True
        for view in self.ranks.values():
            if not view.dead:
                self._cluster.send(view.rank, Fence(LAST_EPOCH))
                self._cluster.send(view.rank, Stop())

    def tick(self, now: float) -> None:
        """Judge deadlines. Called a few times a second, after the inbox has been drained.

        After a stall of its own the engine judges nobody in this tick, and moves the deadlines.
        """
        if stalled_s := self._own_stall_s(now):
            self.coordinator.postpone(stalled_s)
            return
        match self.state:
            case Starting(deadline=deadline) if now > deadline:
                slow = sorted(r for r, v in self.ranks.items() if not v.ready)
                self._fail(f"ranks {slow} did not start within {self.config.start_timeout_s:.0f} s")
            case Starting(exited=Fault() as fault, exited_at=at) if now - at > LAST_WORDS_S:
                self._fail_start(fault)
            case Recovering() if (overdue := self.coordinator.overdue(now)) is not None:
                self._again(overdue, now)
            case Serving() | Recovering() if self._symptom_lasts(now):
                self._again([], now)
            case _:
                pass

    def _own_stall_s(self, now: float) -> float:
        """How long the engine itself stood still before this tick, seconds."""
        gap_s, self._last_tick = now - self._last_tick, now
        return gap_s if gap_s > OWN_STALL_S else 0.0

    def _symptom_lasts(self, now: float) -> bool:
        since = self._symptom_since
        return since is not None and now - since > self.config.policy.symptom_grace_s

    def _again(self, faults: list[Fault], now: float) -> None:
        """Begin (again) from the fence. Each time counts towards the policy's limit."""
        if self.coordinator.active:
            self._starts.append(now)
        self._accuse(faults, now)

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, submission: Submission, sink: Sink) -> LiveRequest:
        """Admit a request. While starting or recovering its sequences wait for a rank.

        Raises EngineUnavailable once the instance has failed.
        """
        if isinstance(self.state, FailedState):
            raise EngineUnavailable(f"the instance has failed: {self.state.reason}")
        request = self.ledger.admit(submission, sink, self.degraded)
        self.totals.prompt_tokens += sum(len(p) for p in submission.prompts)
        if isinstance(self.state, Serving):
            self._assign()
        return request

    def abort(self, request: LiveRequest) -> None:
        """The client is gone."""
        self.ledger.abort(request)

    @property
    def degraded(self) -> bool:
        """Whether experts are missing."""
        return bool(self.missing)

    def _assign(self) -> None:
        if self.ledger.assign_waiting(self.topology.attention):
            self._wake += 1
            for rank in self.topology.members:
                self._send(rank, Wake(self._wake))

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
                view.ready, view.maskable = True, report.maskable
                view.stats = RankStats(kv_blocks_total=report.kv_blocks_total)
                self._on_ready(view, report)
            case Heartbeat():
                if view.ready:
                    view.stats = report.stats
            case Tokens():
                self._on_tokens(report, now)
            case FenceAck():
                self.coordinator.on_ack(report)
                self._proceed(now)
            case Resumed():
                self._on_resumed(report, now)
            case StepAborted():
                self._on_symptom(report, now)
            case Fatal():
                self._on_fatal(view, report)
            case _:
                assert_never(report)

    def on_exit(self, rank: RankId, incarnation: Incarnation, detail: str, now: float) -> None:
        """A rank's process is gone: the one signal that accuses by itself."""
        fault = self.detector.exited(rank, incarnation, detail, now)
        if fault is None:
            return
        view = self.ranks[rank]
        if self._stopping or isinstance(self.state, FailedState) or view.dead:
            view.dead = True
            return
        if isinstance(self.state, Starting):
            view.fault = fault
            if self.state.exited is None:
                self.state.exited, self.state.exited_at = fault, now
            if view.last_words:
                self._fail_start(fault)
            return
        self._accuse([fault], now)

    def on_forkserver_gone(self) -> None:
        """Its ranks live on. Only ranks that are still to start need it."""
        self._event("forkserver_gone", {})
        if isinstance(self.state, Starting) and not all(v.ready for v in self.ranks.values()):
            self._fail("the fork server ended while ranks were starting")

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
        self._send(rank, fault)

    def what_if(self, ranks: list[RankId]) -> dict[str, Any]:
        """The plan for the loss of these ranks now; does nothing. Raises ValueError."""
        for rank in ranks:
            if rank not in self.topology.members:
                raise ValueError(f"id {rank} is not a member of epoch {self.topology.epoch}")
        faults = [Fault(rank, "whatif", "asked by an operator") for rank in ranks]
        world = self._world(self._clock())
        return describe_plan(plan_recovery(world, faults, self.config.policy))

    def _on_ready(self, view: RankView, ready: Ready) -> None:
        log.info(
            "rank %d ready on %s: %d KV blocks, weights in %.2f s",
            view.rank, ready.device, ready.kv_blocks_total, ready.load_s,
        )  # fmt: skip
        if isinstance(self.state, Starting) and all(v.ready for v in self.ranks.values()):
            configure = Configure(
                epoch=self.topology.epoch,
                step=0,
                topology=self.topology,
                placement=self.placement,
                domain=self._cluster.domain(),
                wake=self._wake,
            )
            for rank in self.topology.members:
                self._send(rank, configure)

    def _on_tokens(self, report: Tokens, now: float) -> None:
        arrival = self.ledger.on_tokens(report)
        self._count(arrival, report)
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

    def _count(self, arrival: Arrival, report: Tokens) -> None:
        self.totals.generation_tokens += arrival.new_tokens
        self.totals.step_s.append(report.step_s)
        for reason in arrival.finished:
            self.totals.finished[reason] = self.totals.finished.get(reason, 0) + 1

    def _on_resumed(self, report: Resumed, now: float) -> None:
        if isinstance(self.state, Starting):
            self.state.waiting.discard(report.rank)
            if not self.state.waiting:
                self._begin_serving(self.state.exited, now)
            return
        finished = self.coordinator.on_resumed(report, now)
        if finished is not None:
            self._finish(finished)

    def _begin_serving(self, exited: Fault | None, now: float) -> None:
        """All have met. One that exited just after that is a fault like any later one."""
        self._enter(Serving())
        if exited is not None:
            self._accuse([exited], now)
        else:
            self._assign()

    def _on_symptom(self, report: StepAborted, now: float) -> None:
        self.totals.symptoms += 1
        self._event("symptom", {"id": report.rank, "detail": report.detail})
        if isinstance(self.state, Starting):
            self._fail(f"the ranks could not meet: {report.detail}")
            return
        plan = self.coordinator.plan
        if self.coordinator.active and plan is None:
            return  # Fencing: the epoch it comes from is being left already.
        present = plan.topology.epoch if plan is not None else self.topology.epoch
        if report.epoch == present and self._symptom_since is None:
            self._symptom_since = now

    def _on_fatal(self, view: RankView, report: Fatal) -> None:
        lines = report.detail.strip().splitlines()
        view.last_words = lines[-1] if lines else ""
        if report.user_error and isinstance(self.state, Starting):
            self._fail(view.last_words, user_error=True)

    # ---- recovery ----------------------------------------------------------------------------

    def _accuse(self, faults: list[Fault], now: float) -> None:
        for fault in faults:
            view = self.ranks[fault.rank]
            view.dead, view.fault = True, fault
            self._event("fault", {"id": fault.rank, "kind": fault.kind, "detail": fault.detail})
        self._recover(faults, now)

    def _recover(self, faults: list[Fault], now: float) -> None:
        if not self.coordinator.active:
            self._starts.append(now)
        busy = self.ledger.num_unfinished > 0
        self._symptom_since = None
        self.coordinator.begin(self.topology, faults, now)
        record = self.coordinator.record
        if record.last_old_step is None and busy:
            record.last_old_step = self._last_commit
        self._unresumed = record if busy else None
        self._enter(Recovering())
        self._proceed(now)

    def _proceed(self, now: float) -> None:
        carried_out = self.coordinator.plan
        finished = self.coordinator.proceed(
            lambda: self._world(now), self._cluster.domain(), self._wake
        )
        plan = self.coordinator.plan
        if finished is not None:
            self._finish(finished)
        elif plan is not None and plan is not carried_out:
            if plan.placement.missing():
                self.ledger.mark_degraded()
            moved = [self.ledger.request_id(m.seq_id) for m in plan.migrations]
            self._event("migrated", {"epoch": plan.topology.epoch, "requests": moved})

    def _world(self, now: float) -> World:
        horizon = now - self.config.policy.window_s
        return World(
            topology=self.topology,
            placement=self.placement,
            sequences=self.ledger.unfinished(),
            maskable=all(view.maskable for view in self.ranks.values()),
            recent_recoveries=sum(t >= horizon for t in self._starts)
            - int(self.coordinator.active),
        )

    def _finish(self, finished: Finished) -> None:
        record = finished.record
        self.records.append(record)
        key = (record.cause, record.outcome or "failed")
        self.totals.recoveries[key] = self.totals.recoveries.get(key, 0) + 1
        self.totals.migrated += record.migrated
        self.totals.recomputed_tokens += record.recomputed_tokens
        match finished:
            case Recovered(plan=plan):
                self.topology, self.placement = plan.topology, plan.placement
                self.missing = plan.placement.missing()
                if self.degraded:
                    self.ledger.mark_degraded()
                log.info("epoch %d: %s", plan.topology.epoch, record.reason)
                self._enter(Serving())
                self._assign()
            case Failed(reason=reason):
                self._fail(reason)

    def _fail_start(self, fault: Fault) -> None:
        view = self.ranks[fault.rank]
        view.dead = True
        self._fail(f"rank {fault.rank} ended while starting: {view.last_words or fault.detail}")

    def _fail(self, reason: str, user_error: bool = False) -> None:
        log.error("failed: %s", reason)
        self._enter(FailedState(reason, user_error))
        ended = self.ledger.fail_all(f"the instance has failed: {reason}", 503)
        self._event("failed", {"reason": reason, "streams_ended": ended})
        for view in self.ranks.values():
            self._cluster.kill(view.rank)

    # ---- helpers -----------------------------------------------------------------------------

    def _enter(self, state: State) -> None:
        self.state = state
        self._event("state", {"state": state_name(state), "epoch": self.topology.epoch})

    def _event(self, kind: str, detail: dict[str, Any]) -> None:
        self._on_event({"event": kind, **detail})

    def _send(self, rank: RankId, command: Command) -> None:
        self._cluster.send(rank, command)

    def _incarnation(self, rank: RankId) -> Incarnation:
        return self.ranks[rank].incarnation


def state_name(state: State) -> str:
    """As the status document spells it."""
    match state:
        case Starting():
            return "starting"
        case Serving():
            return "serving"
        case Recovering():
            return "recovering"
        case FailedState():
            return "failed"
        case _:
            assert_never(state)


def describe_plan(plan: RecoveryPlan) -> dict[str, Any]:
    """A plan as a JSON document."""
    if isinstance(plan, GiveUp):
        return {"outcome": "failed", "reason": plan.reason}
    return {
        "outcome": "recovered",
        "reason": plan.reason,
        "members": list(plan.topology.members),
        "migrations": [{"seq_id": m.seq_id, "to": m.to} for m in plan.migrations],
        "recomputed_tokens": sum(m.num_tokens for m in plan.migrations),
        "experts_dropped": plan.experts_dropped,
        "experts_masked": [list(pair) for pair in plan.masked],
    }


def first_topology_epoch() -> Epoch:
    """Epochs count from 1."""
    return Epoch(1)
