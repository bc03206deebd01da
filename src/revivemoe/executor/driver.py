"""Performs what the step loop asks for, on one rank: with torch, sockets and shared memory.

What the loop knows nothing of lies here: injected faults, progress and timings, the statistics.
"""

import queue
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar, assert_never

import msgspec
import torch

from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.domain import Domains
from revivemoe.comm.transport import Transport
from revivemoe.core import effects
from revivemoe.core.loop import StepLoop
from revivemoe.core.progress import Progress
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, StepHeader, StepResult
from revivemoe.executor.injection import Injections
from revivemoe.executor.loading import Loader
from revivemoe.executor.threads import Threads
from revivemoe.messages.commands import Command, Configure, Inject
from revivemoe.messages.reports import ExpertsLoaded, RankStats, Report
from revivemoe.messages.tally import Tally
from revivemoe.model.dense import dense_servers
from revivemoe.model.runner import ModelRunner

IDLE_WAIT_S = 0.4
"""How long a parked or fenced rank sleeps between ticks of its progress counter."""
STATS_EVERY_S = 0.05
DOMAIN_BUDGET_S = 5.0
"""What entering a domain may take, waits for the others not counted."""
T = TypeVar("T")
Inbox = queue.SimpleQueue[Command | ExpertsLoaded]


class Driver:
    """Runs one rank's step loop on the main thread until `Stop`."""

    def __init__(
        self,
        rank: Rank,
        runner: ModelRunner,
        domains: Domains,
        inbox: Inbox,
        report: Callable[[Report], None],
        progress: Progress,
    ) -> None:
        self._rank, self._runner, self._domains = rank, runner, domains
        self._inbox, self._report, self._progress = inbox, report, progress
        self._loader = Loader(runner, domains, progress, (rank.rank_id, rank.incarnation))
        self._transport: Transport | None = None
        self._injections = Injections()
        # Graphs are compiled for a number of threads.
        threads = 1 if runner.in_graphs else torch.get_num_threads()
        self._threads, self._microbatched = Threads(threads), False
        self._memory_bytes = runner.num_bytes()
        self._step_began = self._waited_before_s = 0.0
        self._step_s = self._waited_s = 0.0
        """In all steps that were run."""
        self._stats, self._stats_at = rank.stats(), 0.0
        self._loop = StepLoop(rank, str(runner.device), report)
        runner.exchange.on_phase = self._reach
        runner.exchange.spoil = self._injections.spoilt

    def run(self) -> None:
        """Until told to stop. What breaks this rank for good is raised."""
        steps = self._loop.run()
        effect = next(steps)
        while True:
            try:
                try:
                    answer = self._perform(effect)
                except (effects.Left, effects.Broken, effects.LoadFailed) as interruption:
                    effect = steps.throw(interruption)
                else:
                    effect = steps.send(answer)
            except StopIteration:
                return

    def stats(self) -> RankStats:
        """Called from the control thread: the last published snapshot."""
        return self._stats

    def holdings(self) -> Tally:
        """Called from the control thread: of what has been reported."""
        return self._loop.holdings

    def _perform(self, effect: effects.Effect) -> object:
        match effect:
            case effects.Commands():
                return self._take_commands(effect.wait)
            case effects.Reach():
                self._reach_of_loop(effect)
            case effects.Exchange():
                return self._exchange(effect.header)
            case effects.Forward():
                return self._forward(effect.batch)
            case effects.Load():
                return self._change_memory(partial(self._loader.load, effect))
            case effects.LoadBeside():
                self._loader.load_beside(effect.command, self._inbox.put)
            case effects.GiveUpAttention():
                self._change_memory(partial(self._loader.give_up_attention, effect.num_slots))
            case effects.Enter():
                return self._enter(effect.configure)
            case effects.Leave():
                return self._leave(effect.begun)
            case _:
                assert_never(effect)
        return None

    # ---- commands ----------------------------------------------------------------------------

    def _take_commands(self, wait: bool) -> list[Command]:
        """Those that have come. What is the driver's own business is seen to at once."""
        self._publish_stats()
        if wait:
            self._progress.idle()
        taken: list[Command] = []
        try:
            while True:
                match self._inbox.get(wait, IDLE_WAIT_S):
                    case ExpertsLoaded() as loaded:
                        self._report(loaded)
                    case Inject() as fault:
                        self._injections.add(fault)
                    case command:
                        taken.append(command)
                wait = False
        except queue.Empty:
            pass
        return taken

    def _publish_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY_S:
            self._stats_at = now
            self._stats = msgspec.structs.replace(
                self._rank.stats(),
                memory_bytes=self._memory_bytes,
                step_s=self._step_s,
                waited_s=self._waited_s,
                recompiled=self._runner.recompiled,
            )

    # ---- the step ----------------------------------------------------------------------------

    def _exchange(self, header: StepHeader) -> list[StepHeader]:
        assert self._transport is not None
        return [StepHeader(*row) for row in self._transport.all_gather_ints(header)]

    def _forward(self, batch: Batch) -> effects.Ran:
        began, results = time.monotonic(), list[StepResult]()
        waited_s = self._progress.total_waited_s
        if batch.items:
            results = self._runner.execute(batch)
        else:
            self._runner.serve()
        waited_s = self._progress.total_waited_s - waited_s
        if not self._microbatched:  # each of them computes in a thread that has its own count
            self._threads.look()
        return effects.Ran(results, time.monotonic() - began, waited_s)

    def _reach_of_loop(self, effect: effects.Reach) -> None:
        now = time.monotonic()
        if effect.phase == "schedule":
            self._step_began, self._waited_before_s = now, self._progress.total_waited_s
        self._reach(effect.phase, -1, effect.num_rows)
        if effect.phase == "commit":
            self._step_s += now - self._step_began
            self._waited_s += self._progress.total_waited_s - self._waited_before_s

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
        state = self._rank.state
        begun = state.open if isinstance(state, InDomain) else None
        items = begun.batch.items if begun is not None else ()
        return {token for item in items for token in item.sequence.prompt_ids}

    # ---- roles and experts -------------------------------------------------------------------

    def _change_memory(self, load: Callable[[], T]) -> T:
        try:
            return load()
        finally:
            self._memory_bytes = self._runner.num_bytes()

    # ---- the domain --------------------------------------------------------------------------

    def _enter(self, configure: Configure) -> float:
        began, membership, domain = time.monotonic(), configure.membership, configure.domain
        me = self._rank.rank_id
        self._progress.announce("domain", DOMAIN_BUDGET_S)
        try:
            channels = self._domains.enter(domain, membership.epoch, membership.members, me)
        except OSError as error:
            raise effects.Broken(str(error)) from error
        self._loader.entered(membership, domain)
        topology, slots_per_rank = membership.topology, membership.placement.slots_per_rank
        sources, servers = topology.places(topology.attention), topology.places(topology.experts)
        rows = self._runner.kernels.rows
        dispatchers = [Dispatcher(c, slots_per_rank, sources, servers, rows) for c in channels]
        self._runner.enter(dispatchers, membership, me)
        if (groups := membership.dense) is not None:  # slots on the wire are shards
            holders = dense_servers(groups, topology)
            dispatchers = [Dispatcher(c, groups.size, sources, holders, rows) for c in channels]
            self._runner.exchange.enter_dense(dispatchers, membership, me)
        self._transport, self._microbatched = channels[0], len(channels) > 1
        return time.monotonic() - began

    def _leave(self, begun: Batch | None) -> effects.Departure:
        """What the forward wrote is zeroed: if there is a NaN in it, it would leak through
        attention. The domain is left first: a device that is stuck must not hold the others.
        """
        began, place = time.monotonic(), None
        self._runner.exchange.leave()
        self._domains.leave()
        self._transport = None
        if begun is not None:
            place = self._runner.exchange.non_finite()
            if begun.items:
                self._runner.zero_written(begun)
        return effects.Departure(place, time.monotonic() - began)
