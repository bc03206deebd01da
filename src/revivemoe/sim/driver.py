"""Performs what the step loop asks for on a simulated rank: transport, forward and loads are fakes.

The loop itself is the real one (`core.loop`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from revivemoe.core import effects
from revivemoe.core.loop import Effects, StepLoop
from revivemoe.core.rank import Rank
from revivemoe.core.slots import ExpertSlots, SlotTaken
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch
from revivemoe.ids import Epoch
from revivemoe.messages.commands import Command, Configure, LoadExperts
from revivemoe.messages.reports import ExpertsLoaded, Fatal, FenceAck, Ready, Report
from revivemoe.sim.domain import Domain
from revivemoe.sim.forward import Doing, FakeForward, Steps, results_of
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.process import Process
from revivemoe.sim.requests import Idle, Meet, Work

DOMAIN_S = 0.002
LOAD_EXPERT_S = 0.01
STEPS_PER_CHECK = 6
"""Every so many steps all blocks are checked; before every acknowledgement in any case."""

EnterDomain = Callable[[Configure, Process], Domain]
Later = Callable[[float, Callable[[], None]], None]


@dataclass
class Driver:
    """One rank process, from its start to its end."""

    _process: Process
    rank: Rank
    forward: FakeForward
    slots: ExpertSlots
    _load_s: float
    _enter_domain: EnterDomain
    _later: Later
    _mishaps: Mishaps
    _steps: int = 0
    _undone: bool = False
    """A step was cut since the blocks were last checked."""

    def run(self) -> Steps:
        """As `executor.main` runs one: load, say so, step until told to stop, last words."""
        rank, process = self.rank, self._process
        process.progress.announce("load", 5 * self._load_s)
        yield Work("load", -1, self._load_s)
        try:
            if self._mishaps.load_fails(process):
                raise effects.LoadFailed("weights: read error")
            num_blocks = rank.limits.num_blocks
            process.report(Ready(rank.rank_id, rank.incarnation, "sim", num_blocks, self._load_s))
            loop = StepLoop(rank, "sim", self._report)
            process.holdings = lambda: loop.holdings
            yield from self._drive(loop.run())
        except effects.LoadFailed as failure:
            process.report(Fatal(rank.rank_id, rank.incarnation, str(failure)))
            process.die("exited with status 1")

    def _drive(self, steps: Effects) -> Steps:
        effect = next(steps)
        while True:
            try:
                try:
                    answer = yield from self._perform(effect)
                except (effects.Left, effects.Broken, effects.LoadFailed) as interruption:
                    effect = steps.throw(interruption)
                else:
                    effect = steps.send(answer)
            except StopIteration:
                return

    def _report(self, report: Report) -> None:
        if isinstance(report, FenceAck):
            self.forward.check()
        self._process.report(report)

    def _perform(self, effect: effects.Effect) -> Doing[object]:
        match effect:
            case effects.Commands():
                self._check_undo()
                if effect.wait and self._is_idle():
                    yield Idle()
                return self._take_commands()
            case effects.Reach():
                if not self._reach(effect):
                    yield Work(effect.phase, -1, 0.0)
            case effects.Exchange():
                headers = yield Meet("schedule", -1, effect.header)
                self._process.met = Epoch(effect.header.epoch)
                return headers
            case effects.Forward():
                return (yield from self._forward(effect.batch))
            case effects.Load():
                return (yield from self._load(effect))
            case effects.LoadBeside():
                self._load_beside(effect.command)
            case effects.GiveUpAttention():
                self.slots.resize(effect.num_slots)
            case effects.Enter():
                return (yield from self._enter(effect.configure))
            case effects.Leave():
                self._process.leave_domain()
                self._undone |= effect.begun is not None
                return effects.Departure(self.forward.place, 0.0)
            case _:
                assert_never(effect)
        return None

    # ---- commands and steps ------------------------------------------------------------------

    def _is_idle(self) -> bool:
        self._process.progress.idle()
        return not self._process.inbox

    def _take_commands(self) -> list[Command]:
        inbox = self._process.inbox
        taken: list[Command] = []
        while inbox:
            match inbox.popleft():
                case ExpertsLoaded() as loaded:
                    self._process.report(loaded)
                case command:
                    taken.append(command)
        return taken

    def _reach(self, effect: effects.Reach) -> bool:
        """Faults strike here, too. False: whoever is stuck by one goes no further."""
        state, process = self.rank.state, self._process
        assert isinstance(state, InDomain)
        if effect.phase == "schedule":
            process.step = state.step
            self._steps += 1
            if self._steps % STEPS_PER_CHECK == 0:
                self.forward.check()
        process.progress.work(effect.phase, -1, state.step, effect.num_rows)
        return process.reach(effect.phase)

    def _check_undo(self) -> None:
        if self._undone:
            self._undone = False
            self.forward.check()

    def _forward(self, batch: Batch) -> Doing[effects.Ran]:
        state, began = self.rank.state, self._process.now
        assert isinstance(state, InDomain)
        yield from self.forward.run(batch, state.mask_key)
        return effects.Ran(results_of(batch), self._process.now - began)

    # ---- epochs and experts ------------------------------------------------------------------

    def _enter(self, configure: Configure) -> Doing[float]:
        membership = configure.membership
        healthy = membership.dense is None or membership.dense.healthy(membership.attention)
        assert healthy, "no dense group"
        self._process.progress.announce("domain", 1.0)
        yield Work("domain", -1, DOMAIN_S)
        if self._process.fenced > configure.epoch:
            raise effects.Left
        self._process.enter_domain(self._enter_domain(configure, self._process))
        return DOMAIN_S

    def _load(self, wanted: effects.Load) -> Doing[effects.Loaded]:
        """What the slots do not hold yet, one after another: a fence must not wait for all."""
        count, began = 0, self._process.now
        for load in self.slots.lacking(wanted.table):
            if self._process.fenced > wanted.epoch:
                raise effects.Left
            self.slots.begin([load])
            self._process.progress.announce("load", 10 * LOAD_EXPERT_S)
            yield Work("load", -1, LOAD_EXPERT_S)
            if self._mishaps.load_fails(self._process):
                raise effects.LoadFailed("read error")
            self.slots.fill(load)
            count += 1
        return effects.Loaded(self._process.now - began, 0, {"disk": count} if count else {})

    def _load_beside(self, command: LoadExperts) -> None:
        """A thread of its own loads them; the steps go on."""
        seconds, begun = LOAD_EXPERT_S * len(command.loads), self.slots.begin(command.loads)
        if self._mishaps.load_is_silent(self._process):
            return
        self._later(seconds, lambda: self._loaded_beside(command, begun, seconds))

    def _loaded_beside(self, command: LoadExperts, begun: int, seconds: float) -> None:
        """The driver tells of it between two steps."""
        if not self._process.alive:
            return
        error = "read error" if self._mishaps.load_fails(self._process) else None
        try:
            for load in command.loads if error is None else ():
                self.slots.check(begun, load)
                self.slots.fill(load)
        except SlotTaken as taken:
            error = str(taken)
        rank, incarnation = self.rank.rank_id, self.rank.incarnation
        self._process.hand(ExpertsLoaded(rank, incarnation, command.request, seconds, 0, error))
