"""The step loop of a simulated rank: `executor.loop`, event by event, with a fake transport.

commands -> begin_step -> exchange headers -> agree -> execute -> commit -> report
"""

from collections.abc import Callable
from typing import assert_never

import msgspec

from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, Leave, Park, Retry, Run, StepHeader
from revivemoe.ids import Epoch
from revivemoe.membership.placement import (
    EMPTY,
    ExpertPlacement,
)
from revivemoe.messages.reports import (
    Abort,
    Add,
    Command,
    Configure,
    ExpertsLoaded,
    Fatal,
    Fence,
    FenceAck,
    Inject,
    LoadExperts,
    NonFinite,
    Ready,
    Resumed,
    StepAborted,
    Stop,
    SwitchRole,
    Wake,
)
from revivemoe.sim.domain import Domain
from revivemoe.sim.forward import Forward, Steps, results_of
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.process import Process
from revivemoe.sim.requests import (
    CommunicationFailed,
    DomainLeft,
    Idle,
    Meet,
    NumbersBroken,
    Work,
)

DOMAIN_S = 0.002
LOAD_EXPERT_S = 0.01
COMMITS_PER_CHECK = 6
"""Every so many commits all blocks are checked; after every fence in any case."""

Enter = Callable[[Configure, Process], Domain]
Later = Callable[[float, Callable[[], None]], None]


class StepLoop:
    """Owns the order of things on one rank."""

    def __init__(
        self,
        process: Process,
        rank: Rank,
        forward: Forward,
        slots: list[list[int]],
        load_s: float,
        enter: Enter,
        later: Later,
        mishaps: Mishaps,
    ) -> None:
        """`slots[layer index][slot]`: the expert that lies there, or -1."""
        self.rank, self.forward, self.slots = rank, forward, slots
        self._process, self._load_s, self._enter = process, load_s, enter
        self._later, self._mishaps = later, mishaps
        self._entered: Configure | None = None
        self._num_loaded = 0
        self._rolled_back = False
        self._stopped = False
        self._commits = 0

    def run(self) -> Steps:
        """Take commands and steps until told to stop."""
        yield Work("load", -1, self._load_s, 5 * self._load_s, announced=True)
        self._fail_start_perhaps()
        rank = self.rank
        num_blocks = rank.limits.num_blocks
        self._process.report(Ready(rank.rank_id, rank.incarnation, "sim", num_blocks, self._load_s))
        while not self._stopped:
            yield from self._take_commands()
            if self._stepping:
                yield from self._step()

    @property
    def _stepping(self) -> bool:
        return self._process.domain is not None and isinstance(self.rank.state, InDomain)

    # ---- commands ----------------------------------------------------------------------------

    def _take_commands(self) -> Steps:
        commands = self._process.commands
        if not self._stepping and not commands:
            yield Idle()
        while commands and not self._stopped:
            yield from self._handle(commands.popleft())
        self._process.stats = self.rank.stats()

    def _handle(self, command: Command | ExpertsLoaded) -> Steps:
        match command:
            case Add():
                self.rank.add(command.sequence)
            case Abort():
                self.rank.abort(command.seq_id)
            case Wake():
                self.rank.wake(command.counter)
            case Fence():
                self._fence(command)
            case Configure():
                yield from self._configure(command)
            case LoadExperts():
                self._load_beside(command)
            case ExpertsLoaded():
                self._process.report(command)
            case SwitchRole():
                yield from self._switch_role(command)
            case Stop():
                self._stopped = True
            case Inject():
                raise AssertionError("the simulation brings its own faults")
            case _:
                assert_never(command)

    def _fence(self, command: Fence) -> None:
        if command.at_boundary:
            ack = self.rank.leave_at_boundary(command.epoch)
            if ack is not None:  # outside the step loop: here and now is a boundary
                self._leave()
                self._process.report(ack)
            return
        self._leave()
        self._acknowledge(self.rank.fence(command.epoch))

    def _acknowledge(self, ack: FenceAck | None) -> None:
        if ack is not None:
            self.forward.check()
            undone, self._rolled_back = self._rolled_back, False
            self._process.report(msgspec.structs.replace(ack, rolled_back=undone))

    def _configure(self, command: Configure) -> Steps:
        rank = self.rank
        if not rank.configure(command.epoch, command.step, mask_key(command), command.wake):
            return
        attention = command.topology.attention
        assert command.dense is None or command.dense.healthy(attention), "no dense group"
        try:
            if self.rank.limits.num_blocks and rank.rank_id not in attention:
                self._become_expert_rank(command.placement)
            yield from self._load_now(command.epoch, command.placement)
        except DomainLeft:
            return
        except OSError as error:
            self._process.report(self._loaded_report(0, 0.0, str(error)))
            return
        yield Work("domain", -1, DOMAIN_S, 1.0, announced=True)
        if self._process.fenced <= command.epoch:
            self._process.enter_domain(self._enter(command, self._process))
            self._entered = command

    def _become_expert_rank(self, placement: ExpertPlacement) -> None:
        self.rank.give_up_attention()
        self.slots[:] = [[EMPTY] * len(row) for row in placement.slots[self.rank.rank_id]]

    def _switch_role(self, command: SwitchRole) -> Steps:
        """Outside of the domain; `Ready` once the experts are there."""
        rank = self.rank
        if rank.limits.num_blocks:
            self._become_expert_rank(command.placement)
        try:
            yield from self._load_now(command.epoch, command.placement)
        except DomainLeft:
            return
        except OSError as error:
            self._process.report(self._loaded_report(0, 0.0, str(error)))
            self._process.die("exited with status 1")
            return
        self._process.report(Ready(rank.rank_id, rank.incarnation, "sim", 0, 0.0))

    def _load_now(self, epoch: Epoch, placement: ExpertPlacement) -> Steps:
        """Load what the map gives to this rank and does not lie in its slots yet."""
        self._num_loaded = 0
        wanted = placement.slots.get(self.rank.rank_id, ())
        for layer, row in enumerate(wanted):
            for slot, expert in enumerate(row):
                if expert not in (EMPTY, self.slots[layer][slot]):
                    yield from self._load_one(epoch)
                    self.slots[layer][slot] = expert
                    self._num_loaded += 1

    def _load_one(self, epoch: Epoch) -> Steps:
        if self._process.fenced > epoch:  # a fence must not wait for all loads
            raise DomainLeft
        yield Work("load", -1, LOAD_EXPERT_S, 10 * LOAD_EXPERT_S, announced=True)
        if self._mishaps.load_fails(self._process):
            raise OSError("read error")

    def _fail_start_perhaps(self) -> None:
        if self._mishaps.load_fails(self._process):
            rank = self.rank
            self._process.report(Fatal(rank.rank_id, rank.incarnation, "weights: read error"))
            self._process.die("exited with status 1")

    def _load_beside(self, command: LoadExperts) -> None:
        """A thread of its own loads them; the steps go on."""
        seconds = LOAD_EXPERT_S * len(command.loads)
        self._later(seconds, lambda: self._loaded_beside(command, seconds))

    def _loaded_beside(self, command: LoadExperts, seconds: float) -> None:
        """The step loop tells of it between two steps."""
        if not self._process.alive:
            return
        error = "read error" if self._mishaps.load_fails(self._process) else None
        if error is None:
            for load in command.loads:
                self.slots[load.layer][load.slot] = load.expert
        self._process.hand(self._loaded_report(command.request, seconds, error))

    def _loaded_report(self, request: int, seconds: float, error: str | None) -> ExpertsLoaded:
        rank = self.rank
        return ExpertsLoaded(rank.rank_id, rank.incarnation, request, seconds, 0, error)

    # ---- the step ----------------------------------------------------------------------------

    def _step(self) -> Steps:
        try:
            yield from self._run_step()
        except DomainLeft:
            self._leave()
        except CommunicationFailed as failure:
            self._abort_step(failure)
        except NumbersBroken as failure:
            self._report_numbers(failure)
            self._abort_step(failure)

    def _run_step(self) -> Steps:
        batch = self.rank.begin_step()
        self._process.step = batch.step
        answer = yield Meet("headers", -1, self.rank.header())
        assert answer is not None
        headers = [h for h in answer if isinstance(h, StepHeader)]
        agreement = self.rank.agree(headers)
        self._report_resumed()
        match agreement:
            case Run():
                yield from self._execute(batch)
            case Leave(epoch=epoch):
                self._leave()
                self._acknowledge(self.rank.fence(epoch))
            case Park() | Retry():
                pass
            case _:
                assert_never(agreement)

    def _execute(self, batch: Batch) -> Steps:
        state = self.rank.state
        assert isinstance(state, InDomain)
        if batch.items:
            self.rank.mark_executing()
            yield from self.forward.execute(batch, state.mask_key)
        else:
            yield from self.forward.serve()
        tokens = self.rank.commit(results_of(batch))
        self._check_now_and_then()
        if tokens.tokens or tokens.prompt_logprobs:
            self._process.report(tokens)

    def _check_now_and_then(self) -> None:
        self._commits += 1
        if self._commits % COMMITS_PER_CHECK == 0:
            self.forward.check()

    def _report_resumed(self) -> None:
        if self._entered is None:
            return
        rank, entered = self.rank, self._entered
        self._entered = None
        resumed = Resumed(rank.rank_id, rank.incarnation, entered.epoch, entered.step, DOMAIN_S)
        self._process.report(msgspec.structs.replace(resumed, experts_loaded=self._num_loaded))

    def _report_numbers(self, failure: NumbersBroken) -> None:
        state, rank = self.rank.state, self.rank
        assert isinstance(state, InDomain)
        self._process.report(
            NonFinite(
                rank.rank_id,
                rank.incarnation,
                state.epoch,
                state.step,
                failure.layer,
                failure.phase,
                failure.produced_here,
            )
        )

    def _abort_step(self, failure: Exception) -> None:
        state, rank = self.rank.state, self.rank
        assert isinstance(state, InDomain)
        self._leave()
        self._process.report(
            StepAborted(rank.rank_id, rank.incarnation, state.epoch, state.step, str(failure))
        )

    def _leave(self) -> None:
        """Roll the open step back, if any, and leave the domain. Waits for nobody."""
        if self.rank.roll_back():
            self._rolled_back = True
            self.forward.check()
        self._process.leave_domain()


def mask_key(command: Configure) -> bytes:
    """Names the set of missing experts, as the executor does."""
    missing = command.placement.missing()
    return ",".join(f"{layer}.{expert}" for layer, expert in missing).encode()
