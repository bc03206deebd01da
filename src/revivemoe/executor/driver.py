"""The step loop of one rank: drives `core.rank` with the model and the communication domain.

    commands -> begin_step -> exchange headers -> agree -> execute -> commit -> report

A communication failure, non-finite numbers or a fence end the step: it is rolled back, the domain
is left, and the rank waits for the engine to configure the next epoch. It accuses nobody.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

import msgspec

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import CommunicationFailed, DomainLeft
from revivemoe.comm.transport import Transport
from revivemoe.core.progress import Progress
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, Leave, Run, StepHeader
from revivemoe.executor.injection import Injections
from revivemoe.executor.weights import PeerSource
from revivemoe.ids import Epoch
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.membership.topology import Topology
from revivemoe.messages.reports import (
    Abort,
    Add,
    Command,
    Configure,
    DomainSpec,
    ExpertsLoaded,
    Fence,
    FenceAck,
    Inject,
    LoadExperts,
    NonFinite,
    RankStats,
    Ready,
    Report,
    Resumed,
    SlotLoad,
    StepAborted,
    Stop,
    SwitchRole,
    Wake,
)
from revivemoe.model.dense import dense_servers
from revivemoe.model.expert_loads import LoadReport
from revivemoe.model.finite import NonFinitePlace, NonFiniteStep
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import ModelRunner

IDLE_WAIT_S = 0.4
"""How long a parked or fenced rank sleeps between ticks of its progress counter."""
STATS_EVERY_S = 0.05
LOAD_BUDGET_S = 20.0
"""What loading a portion of experts may take, a slow disk included."""


class StepLoop:
    """Owns the order of things on one rank. Runs on the main thread until `Stop`."""

    def __init__(
        self,
        rank: Rank,
        runner: ModelRunner,
        domains: Domains,
        commands: "queue.SimpleQueue[Command | ExpertsLoaded]",
        report: Callable[[Report], None],
        progress: Progress,
    ) -> None:
        self._rank, self._runner, self._domains = rank, runner, domains
        self._commands, self._report, self._progress = commands, report, progress
        self._transport: Transport | None = None
        self._entered: Configure | None = None
        """Set until the first agreement of its epoch."""
        self._domain_s = 0.0
        self._experts_s = 0.0
        self._loaded_now = LoadReport(0, 0.0, {})
        self._memory_bytes = runner.num_bytes()
        self._step_s = self._waited_s = 0.0
        """In all steps that were run."""
        self._peers: list[PeerSource] = []
        """Of the present epoch."""
        self._batch: Batch | None = None
        """Of the step whose forward has begun."""
        self._rolled_back = False
        """Whether a step was undone since the last fence that was acknowledged."""
        self._stopped = False
        self._injections = Injections()
        self._stats = rank.stats()
        self._stats_at = 0.0
        runner.exchange.on_phase = self._reach
        runner.exchange.spoil = self._injections.spoilt

    def run(self) -> None:
        """Take commands and steps until told to stop."""
        while not self._stopped:
            if not self._stepping:
                self._progress.idle()
            self._take_commands(wait=not self._stepping)
            if self._stepping:
                self._step()

    def stats(self) -> RankStats:
        """Called from the control thread: the last published snapshot."""
        return self._stats

    @property
    def _stepping(self) -> bool:
        return self._transport is not None and isinstance(self._rank.state, InDomain)

    # ---- commands ----------------------------------------------------------------------------

    def _take_commands(self, wait: bool) -> None:
        """Handle what has come, in order. With `wait`, sleep until something does (bounded)."""
        try:
            self._handle(
                self._commands.get(timeout=IDLE_WAIT_S) if wait else self._commands.get_nowait()
            )
            while not self._stopped:
                self._handle(self._commands.get_nowait())
        except queue.Empty:
            pass
        self._publish_stats()

    def _handle(self, command: Command | ExpertsLoaded) -> None:
        match command:
            case Add():
                self._rank.add(command.sequence)
            case Abort():
                self._rank.abort(command.seq_id)
            case Wake():
                self._rank.wake(command.counter)
            case Fence():
                self._fence(command)
            case Configure():
                self._configure(command)
            case Inject():
                self._injections.add(command)
            case LoadExperts():
                self._load_beside(command)
            case SwitchRole():
                self._switch_role(command)
            case ExpertsLoaded():
                self._report(command)
            case Stop():
                self._stopped = True
            case _:
                assert_never(command)

    def _fence(self, command: Fence) -> None:
        if command.at_boundary:
            ack = self._rank.leave_at_boundary(command.epoch)
            if ack is not None:  # outside the step loop: here and now is a boundary
                self._leave()
                self._report(ack)
            return
        began = time.monotonic()
        self._leave()
        self._acknowledge(self._rank.fence(command.epoch), began)

    def _acknowledge(self, ack: FenceAck | None, began: float) -> None:
        if ack is not None:
            rollback_s, undone = time.monotonic() - began, self._rolled_back
            self._report(msgspec.structs.replace(ack, rollback_s=rollback_s, rolled_back=undone))
            self._rolled_back = False

    def _configure(self, command: Configure) -> None:
        if not self._rank.configure(command.epoch, command.step, mask_key(command), command.wake):
            return
        began = time.monotonic()
        try:
            self._take_roles(command)
            self._load_now(command)
            self._experts_s, began = time.monotonic() - began, time.monotonic()
            channels = self._domains.enter(
                command.domain, command.epoch, command.topology.members, self._rank.rank_id
            )
        except DomainLeft:
            return
        except CommunicationFailed as failure:
            self._abort_step(str(failure))
            return
        except (CheckpointError, OSError) as error:
            self._report(self._loaded(0, began, 0, str(error)))
            return
        self._peers = [PeerSource(command.placement, command.domain.weights, self._rank.rank_id)]
        topology, slots_per_rank = command.topology, command.placement.slots_per_rank
        sources, servers = topology.places(topology.attention), topology.places(topology.experts)
        dispatchers = [Dispatcher(c, slots_per_rank, sources, servers) for c in channels]
        self._runner.enter(dispatchers, command.placement, topology, self._rank.rank_id)
        if command.dense is not None:
            self._enter_dense(channels, command.dense, topology)
        self._domain_s = time.monotonic() - began
        self._memory_bytes = self._runner.num_bytes()
        self._transport, self._entered = channels[0], command

    def _enter_dense(
        self, channels: Sequence[Transport], groups: DenseGroups, topology: Topology
    ) -> None:
        """Slots on the wire are shards."""
        sources, servers = topology.places(topology.attention), dense_servers(groups, topology)
        dispatchers = [Dispatcher(c, groups.size, sources, servers) for c in channels]
        self._runner.enter_dense(dispatchers, groups, topology, self._rank.rank_id)

    # ---- roles and experts -------------------------------------------------------------------

    def _take_roles(self, command: Configure) -> None:
        """An attention rank that has become an expert rank drops what it does not need any more."""
        runner, me = self._runner, self._rank.rank_id
        if runner.generator is not None and me not in command.topology.attention:
            self._become_expert_rank(command.placement)

    def _become_expert_rank(self, placement: ExpertPlacement) -> None:
        self._progress.announce("role switch", LOAD_BUDGET_S)
        self._rank.give_up_attention()
        self._runner.become_expert_rank(len(placement.slots[self._rank.rank_id][0]))

    def _switch_role(self, command: SwitchRole) -> None:
        """Outside of the domain, while the others go on: ready when the experts are loaded."""
        rank, began = self._rank, time.monotonic()
        if self._runner.generator is not None:
            self._become_expert_rank(command.placement)
        try:
            loaded = self._load(command.epoch, command.placement, command.domain)
        except DomainLeft:
            return
        except (CheckpointError, OSError) as error:
            self._report(self._loaded(0, began, 0, str(error)))
            raise
        self._memory_bytes = self._runner.num_bytes()
        self._report(
            Ready(
                rank.rank_id,
                rank.incarnation,
                str(self._runner.device),
                kv_blocks_total=0,
                load_s=loaded.seconds,
                load_bytes=loaded.num_bytes,
                load_sources=loaded.sources,
            )
        )

    def _load_now(self, command: Configure) -> None:
        """What the map gives this rank and its slots do not hold. Raises DomainLeft if fenced."""
        self._loaded_now = self._load(command.epoch, command.placement, command.domain)
        if command.dense is not None:
            me, attention = self._rank.rank_id, command.topology.attention
            self._progress.announce("load", LOAD_BUDGET_S)
            self._runner.load_shards(command.dense.shards_of(me, attention))

    def _load(self, epoch: Epoch, placement: ExpertPlacement, domain: DomainSpec) -> LoadReport:
        began, num_bytes, sources = time.monotonic(), 0, Counter[str]()
        loads = self._runner.to_load(placement, self._rank.rank_id)
        peers = [PeerSource(placement, domain.weights, self._rank.rank_id)]
        for some in self._runner.in_portions(loads):  # a fence must not wait for all of them
            self._domains.check_fence(epoch)
            self._progress.announce("load", LOAD_BUDGET_S)
            report = self._runner.load_experts(some, peers)
            num_bytes += report.num_bytes
            sources.update(report.sources)
        return LoadReport(num_bytes, time.monotonic() - began, dict(sources))

    def _load_beside(self, command: LoadExperts) -> None:
        """In a thread of its own, into slots that the present epoch does not use."""
        thread = threading.Thread(
            target=self._load_aside, args=(command.request, command.loads, self._peers), daemon=True
        )
        thread.start()

    def _load_aside(
        self, request: int, loads: Sequence[SlotLoad], peers: Sequence[PeerSource]
    ) -> None:
        began = time.monotonic()
        num_bytes, error = 0, None
        try:
            num_bytes = self._runner.load_experts(loads, peers).num_bytes
        except (CheckpointError, OSError, RuntimeError) as failure:
            error = str(failure)
        self._commands.put(self._loaded(request, began, num_bytes, error))

    def _loaded(
        self, request: int, began: float, num_bytes: int, error: str | None
    ) -> ExpertsLoaded:
        rank, seconds = self._rank, time.monotonic() - began
        return ExpertsLoaded(rank.rank_id, rank.incarnation, request, seconds, num_bytes, error)

    # ---- the step ----------------------------------------------------------------------------

    def _step(self) -> None:
        try:
            self._run_step()
        except DomainLeft:
            self._leave()
        except NonFiniteStep as found:
            self._abort_step(
                str(found), NonFinitePlace(found.layer, found.phase, found.produced_here)
            )
        except CommunicationFailed as failure:
            self._abort_step(str(failure))

    def _run_step(self) -> None:
        assert self._transport is not None
        self._reach("schedule", -1, 0)
        began, waited_s = time.monotonic(), self._progress.total_waited_s
        batch = self._rank.begin_step()
        headers = self._transport.all_gather_ints(self._rank.header())
        agreement = self._rank.agree([StepHeader(*row) for row in headers])
        self._report_resumed()
        if isinstance(agreement, Run):
            self._execute(batch)
            self._step_s += time.monotonic() - began
            self._waited_s += self._progress.total_waited_s - waited_s
        elif isinstance(agreement, Leave):
            began = time.monotonic()
            self._leave()
            self._acknowledge(self._rank.fence(agreement.epoch), began)

    def _execute(self, batch: Batch) -> None:
        began = time.monotonic()
        self._batch = batch
        if batch.items:
            self._reach("attention", -1, batch.num_tokens)
            self._rank.mark_executing()
            results = self._runner.execute(batch)
        else:
            self._reach("attention", -1, 0)
            self._runner.serve()
            results = []
        self._reach("commit", -1, batch.num_tokens)
        tokens = self._rank.commit(results, time.monotonic() - began)
        self._batch = None
        if tokens.tokens or tokens.prompt_logprobs:
            self._report(tokens)

    def _report_resumed(self) -> None:
        if self._entered is None:
            return
        rank, entered = self._rank, self._entered
        self._entered = None
        self._report(
            Resumed(
                rank.rank_id,
                rank.incarnation,
                entered.epoch,
                entered.step,
                self._domain_s,
                self._experts_s,
                sum(self._loaded_now.sources.values()),
                self._loaded_now.num_bytes,
                self._loaded_now.sources,
            )
        )

    def _abort_step(self, detail: str, non_finite: NonFinitePlace | None = None) -> None:
        """Undo the step and say what was seen; then wait for the engine."""
        state, rank = self._rank.state, self._rank
        assert isinstance(state, InDomain)
        self._leave(non_finite)
        self._report(StepAborted(rank.rank_id, rank.incarnation, state.epoch, state.step, detail))

    def _leave(self, non_finite: NonFinitePlace | None = None) -> None:
        """Roll the open step back, if any, and leave the domain. Waits for nobody.

        What its forward wrote is zeroed: if there is a NaN in it, it would leak through attention.
        """
        state, batch, self._batch = self._rank.state, self._batch, None
        if batch is not None and isinstance(state, InDomain):
            self._report_non_finite(state, non_finite or self._runner.non_finite())
            if batch.items:
                self._runner.zero_written(batch)
        self._rolled_back |= self._rank.roll_back()
        self._runner.exchange.leave()
        self._domains.leave()
        self._transport = None

    def _report_non_finite(self, state: InDomain, place: NonFinitePlace | None) -> None:
        """Before the fence is acknowledged: the engine must know whose numbers these were."""
        if place is None:
            return
        rank, (layer, phase, here) = self._rank, place
        self._report(
            NonFinite(rank.rank_id, rank.incarnation, state.epoch, state.step, layer, phase, here)
        )

    def _reach(self, phase: str, layer: int, num_rows: int) -> None:
        """A phase of the step begins."""
        state = self._rank.state
        if not isinstance(state, InDomain):
            return
        if delay_s := self._injections.delay_s(self._progress.phase, self._progress.own_s):
            time.sleep(delay_s)
        self._progress.work(phase, layer, state.step, num_rows)
        self._injections.reached(state.step, phase, layer, self._prompt_tokens)

    def _prompt_tokens(self) -> Collection[int]:
        """Tokens in the prompts of the sequences that run in this step."""
        items = self._batch.items if self._batch is not None else ()
        return {token for item in items for token in item.sequence.prompt_ids}

    def _publish_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY_S:
            self._stats_at = now
            self._stats = msgspec.structs.replace(
                self._rank.stats(),
                memory_bytes=self._memory_bytes,
                step_s=self._step_s,
                waited_s=self._waited_s,
            )


def mask_key(command: Configure) -> bytes:
    """Names the set of missing experts: KV is shared only among requests under the same set."""
    missing = command.placement.missing()
    return ",".join(f"{layer}.{expert}" for layer, expert in missing).encode()
