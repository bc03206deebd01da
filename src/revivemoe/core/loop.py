"""The step loop of one rank: the order of things, as a generator of effects.

    commands -> begin_step -> exchange headers -> agree -> forward -> commit -> report

A driver does what is asked: the executor with torch, sockets and shared memory, the simulation with
fakes. A communication failure, non-finite numbers or a fence end the step: it is rolled back, the
domain is left, and the rank waits for the engine to configure the next epoch. It accuses nobody.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar, assert_never

import msgspec

from revivemoe.core import effects
from revivemoe.core.rank import Rank
from revivemoe.core.state import InDomain
from revivemoe.core.step import Batch, Park, Retry, Run
from revivemoe.core.step import Leave as LeaveTogether
from revivemoe.ids import Epoch
from revivemoe.membership.placement import Table
from revivemoe.messages import commands, reports

T = TypeVar("T")
Effects = Generator[effects.Effect, object, None]


@dataclass(frozen=True)
class Entered:
    """An epoch that has been entered, until its first agreement."""

    configure: commands.Configure
    loaded: effects.Loaded
    domain_s: float


class StepLoop:
    def __init__(self, rank: Rank, device: str, report: Callable[[reports.Report], None]) -> None:
        self._rank, self._device, self._report = rank, device, report
        self._in_domain = False
        self._entered: Entered | None = None
        self._begun: Batch | None = None
        """Of the step whose forward has begun."""
        self._rolled_back = False
        """Whether a step was undone since the last fence that was acknowledged."""
        self._stopped = False
        self.holdings = rank.tally
        """Told with heartbeats, by another thread: every token that it counts has been reported."""

    def run(self) -> Effects:
        """Take commands and steps until told to stop."""
        while not self._stopped:
            for command in _of((yield effects.Commands(wait=not self._stepping)), list):
                if not self._stopped:
                    yield from self._handle(command)
                    self.holdings = self._rank.tally
            if self._stepping and not self._stopped:
                yield from self._step()
                self.holdings = self._rank.tally

    @property
    def _stepping(self) -> bool:
        return self._in_domain and isinstance(self._rank.state, InDomain)

    # ---- commands ----------------------------------------------------------------------------

    def _handle(self, command: commands.Command) -> Effects:
        match command:
            case commands.Add():
                self._rank.add(command.sequence)
            case commands.Abort():
                self._rank.abort(command.seq_id)
            case commands.Wake():
                self._rank.wake(command.counter)
            case commands.TellHoldings():
                self._report(self._rank.holdings(command.request))
            case commands.Fence():
                yield from self._fence(command)
            case commands.Configure():
                yield from self._configure(command)
            case commands.LoadExperts():
                yield effects.LoadBeside(command)
            case commands.SwitchRole():
                yield from self._switch_role(command)
            case commands.Stop():
                self._stopped = True
            case commands.Inject():
                raise AssertionError("a driver keeps injected faults to itself")
            case _:
                assert_never(command)

    def _fence(self, command: commands.Fence) -> Effects:
        if command.at_boundary:
            ack = self._rank.leave_at_boundary(command.epoch)
            if ack is not None:  # outside the step loop: here and now is a boundary
                yield from self._leave()
                self._report(ack)
        else:
            yield from self._leave_for(command.epoch)

    def _leave_for(self, epoch: Epoch) -> Effects:
        """Leave the domain, and say what is held."""
        departure = yield from self._leave()
        ack: reports.FenceAck | None = self._rank.fence(epoch)
        if ack is not None:
            undone, self._rolled_back = self._rolled_back, False
            seconds = departure.seconds
            self._report(msgspec.structs.replace(ack, rollback_s=seconds, rolled_back=undone))

    def _configure(self, command: commands.Configure) -> Effects:
        rank, membership = self._rank, command.membership
        if not rank.configure(command.epoch, command.step, membership.mask_key, command.wake):
            return
        table = membership.table_of(rank.rank_id)
        try:
            if rank.rank_id not in membership.attention:
                yield from self._become_expert_rank(table)
            shards = membership.shards_of(rank.rank_id)
            loaded = _of(
                (yield effects.Load(membership, table, command.domain, shards)), effects.Loaded
            )
            domain_s = _of((yield effects.Enter(command)), float)
        except effects.Left:
            return
        except effects.Broken as failure:
            yield from self._abort_step(failure)
            return
        except effects.LoadFailed as failure:
            self._report(self._not_loaded(failure))
            return
        self._in_domain, self._entered = True, Entered(command, loaded, domain_s)

    def _switch_role(self, command: commands.SwitchRole) -> Effects:
        """Outside of the domain, while the others go on: ready when the experts are loaded, or, as
        it has no other role any more, without them.
        """
        rank = self._rank
        try:
            yield from self._become_expert_rank(command.table)
            load = effects.Load(command.membership, command.table, command.domain)
            loaded = _of((yield load), effects.Loaded)
        except effects.Left:
            return
        except effects.LoadFailed as failure:
            self._report(self._not_loaded(failure))
            loaded = effects.Loaded(0.0, 0, {})
        self._report(
            reports.Ready(
                rank.rank_id, rank.incarnation, self._device, kv_blocks_total=0,
                load_s=loaded.seconds, load_bytes=loaded.num_bytes, load_sources=loaded.sources,
            )
        )  # fmt: skip

    @property
    def _has_attention(self) -> bool:
        return self._rank.limits.num_blocks > 0

    def _become_expert_rank(self, table: Table) -> Effects:
        """Unless it is one, with its slots: there may have been no memory for them before."""
        if self._has_attention or self._rank.lacks_slots(table):
            self._rank.give_up_attention()
            yield effects.GiveUpAttention(len(table[0]))

    def _not_loaded(self, failure: effects.LoadFailed) -> reports.ExpertsLoaded:
        rank = self._rank
        return reports.ExpertsLoaded(rank.rank_id, rank.incarnation, 0, 0.0, 0, str(failure))

    # ---- the step ----------------------------------------------------------------------------

    def _step(self) -> Effects:
        try:
            yield from self._run_step()
        except effects.Left:
            yield from self._leave()
        except effects.Broken as failure:
            yield from self._abort_step(failure)

    def _run_step(self) -> Effects:
        yield effects.Reach("schedule")
        batch = self._rank.begin_step()
        headers = yield effects.Exchange(self._rank.header())
        agreement = self._rank.agree(_of(headers, list))
        self._report_resumed()
        match agreement:
            case Run():
                yield from self._execute(batch)
            case LeaveTogether(epoch=epoch):
                yield from self._leave_for(epoch)
            case Park() | Retry():
                pass
            case _:
                assert_never(agreement)

    def _execute(self, batch: Batch) -> Effects:
        self._begun = batch
        yield effects.Reach("attention", batch.num_tokens)
        if batch.items:
            self._rank.mark_executing()
        ran = _of((yield effects.Forward(batch)), effects.Ran)
        yield effects.Reach("commit", batch.num_tokens)
        self._rank.note_pace(batch, ran.seconds - ran.waited_s)
        tokens = self._rank.commit(ran.results, ran.seconds)
        self._begun = None
        if tokens.tokens or tokens.prompt_logprobs:
            self._report(tokens)

    def _report_resumed(self) -> None:
        if self._entered is None:
            return
        entered, rank, self._entered = self._entered, self._rank, None
        loaded = entered.loaded
        self._report(
            reports.Resumed(
                rank.rank_id, rank.incarnation, entered.configure.epoch, entered.configure.step,
                domain_s=entered.domain_s, experts_s=loaded.seconds,
                experts_loaded=sum(loaded.sources.values()), experts_bytes=loaded.num_bytes,
                experts_sources=loaded.sources,
            )
        )  # fmt: skip

    def _abort_step(self, failure: effects.Broken) -> Effects:
        """Undo the step and say what was seen; then wait for the engine."""
        state, rank = self._rank.state, self._rank
        assert isinstance(state, InDomain)
        yield from self._leave()
        told = reports.StepAborted(
            rank.rank_id, rank.incarnation, state.epoch, state.step, str(failure)
        )
        self._report(told)

    def _leave(self) -> Generator[effects.Effect, object, effects.Departure]:
        """Roll the open step back, if any, and leave the domain. Waits for nobody.

        Whose numbers they were is said before the fence is acknowledged: no later claim comes.
        """
        state, begun, self._begun = self._rank.state, self._begun, None
        departure = _of((yield effects.Leave(begun)), effects.Departure)
        if begun is not None and departure.place is not None and isinstance(state, InDomain):
            at = (state.epoch, state.step, *departure.place)
            self._report(reports.NonFinite(self._rank.rank_id, self._rank.incarnation, *at))
        self._rolled_back |= self._rank.roll_back()
        self._in_domain = False
        return departure


def _of(answer: object, kind: type[T]) -> T:
    """An answer of this kind: if it is none, the driver is wrong."""
    assert isinstance(answer, kind), f"{answer!r} instead of {kind.__name__}"
    return answer
