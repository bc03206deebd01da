"""The step loop of one rank: drives `core.rank` with the model and the communication domain.

    commands -> begin_step -> exchange headers -> agree -> execute -> commit -> report

A communication failure or a fence ends the step: it is rolled back, the domain is left, and the
rank waits for the engine to configure the next epoch. It accuses nobody.
"""

import queue
import time
from collections.abc import Callable
from typing import assert_never

import msgspec

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import CommunicationFailed, DomainLeft
from revivemoe.comm.transport import Transport
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, Run, StepHeader
from revivemoe.executor.control import Progress
from revivemoe.executor.injection import Injections
from revivemoe.messages import (
    Abort,
    Add,
    Command,
    Configure,
    Fence,
    Inject,
    RankStats,
    Report,
    Resumed,
    StepAborted,
    Stop,
    Wake,
)
from revivemoe.model.runner import ModelRunner

IDLE_WAIT_S = 0.5
"""How long a parked or fenced rank sleeps between ticks of its progress counter."""
STATS_EVERY_S = 0.05


class StepLoop:
    """Owns the order of things on one rank. Runs on the main thread until `Stop`."""

    def __init__(
        self,
        rank: Rank,
        runner: ModelRunner,
        domains: Domains,
        commands: "queue.SimpleQueue[Command]",
        report: Callable[[Report], None],
        progress: Progress,
    ) -> None:
        self._rank, self._runner, self._domains = rank, runner, domains
        self._commands, self._report, self._progress = commands, report, progress
        self._transport: Transport | None = None
        self._entered: Configure | None = None
        """Set until the first agreement of its epoch."""
        self._domain_s = 0.0
        self._stopped = False
        self._injections = Injections()
        self._stats = rank.stats()
        self._stats_at = 0.0
        runner.exchange.on_phase = self._reach

    def run(self) -> None:
        """Take commands and steps until told to stop."""
        while not self._stopped:
            self._progress.tick()
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

    def _handle(self, command: Command) -> None:
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
            case Stop():
                self._stopped = True
            case _:
                assert_never(command)

    def _fence(self, command: Fence) -> None:
        began = time.monotonic()
        self._leave()
        if ack := self._rank.fence(command.epoch):
            rollback_s = time.monotonic() - began
            self._report(msgspec.structs.replace(ack, rollback_s=rollback_s))

    def _configure(self, command: Configure) -> None:
        if not self._rank.configure(command.epoch, command.step, mask_key(command), command.wake):
            return
        began = time.monotonic()
        try:
            transport = self._domains.enter(
                command.domain, command.epoch, command.topology.members, self._rank.rank_id
            )
        except DomainLeft:
            return
        except CommunicationFailed as failure:
            self._abort_step(failure)
            return
        dispatcher = Dispatcher(transport, command.placement.slots_per_rank)
        self._runner.enter(dispatcher, command.placement, command.topology, self._rank.rank_id)
        self._domain_s = time.monotonic() - began
        self._transport, self._entered = transport, command

    # ---- the step ----------------------------------------------------------------------------

    def _step(self) -> None:
        try:
            self._run_step()
        except DomainLeft:
            self._leave()
        except CommunicationFailed as failure:
            self._abort_step(failure)

    def _run_step(self) -> None:
        assert self._transport is not None
        self._reach("schedule", -1)
        batch = self._rank.begin_step()
        headers = self._transport.all_gather_ints(self._rank.header())
        agreement = self._rank.agree([StepHeader(*row) for row in headers])
        self._report_resumed()
        if isinstance(agreement, Run):
            self._execute(batch)

    def _execute(self, batch: Batch) -> None:
        began = time.monotonic()
        if batch.items:
            self._reach("attention", -1)
            self._rank.mark_executing()
            results = self._runner.execute(batch)
        else:
            self._runner.serve()
            results = []
        self._reach("commit", -1)
        tokens = self._rank.commit(results, time.monotonic() - began)
        if tokens.tokens or tokens.prompt_logprobs:
            self._report(tokens)

    def _report_resumed(self) -> None:
        if self._entered is None:
            return
        rank, entered = self._rank, self._entered
        self._entered = None
        self._report(
            Resumed(rank.rank_id, rank.incarnation, entered.epoch, entered.step, self._domain_s)
        )

    def _abort_step(self, failure: CommunicationFailed) -> None:
        """Undo the step and say what was seen; then wait for the engine."""
        state = self._rank.state
        assert isinstance(state, InDomain)
        self._leave()
        self._report(
            StepAborted(
                self._rank.rank_id, self._rank.incarnation, state.epoch, state.step, str(failure)
            )
        )

    def _leave(self) -> None:
        """Roll the open step back, if any, and leave the domain. Waits for nobody."""
        self._rank.roll_back()
        self._runner.exchange.leave()
        self._domains.leave()
        self._transport = None

    def _reach(self, phase: str, layer: int) -> None:
        self._progress.tick()
        state = self._rank.state
        if isinstance(state, InDomain):
            self._injections.reached(state.step, phase, layer)

    def _publish_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY_S:
            self._stats, self._stats_at = self._rank.stats(), now


def mask_key(command: Configure) -> bytes:
    """Names the set of missing experts: KV is shared only among requests under the same set."""
    missing = command.placement.missing()
    return ",".join(f"{layer}.{expert}" for layer, expert in missing).encode()
