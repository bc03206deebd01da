"""One attention rank's state machine: a step is scheduled, executed, and committed or undone.

    begin_step -> header -> (exchange) -> agree -> mark_executing -> (forward) -> commit
                                            |  Park, Retry: the empty step is closed
                                            |  Leave: closed as well; `fence` follows
    roll_back, fence: at any point; the open step is undone as if it had never begun

Whoever drives it (the executor, the simulation) brings the transport, the forward and the clock.
Request traffic (`add`, `abort`) is valid in every state, but only between steps.
"""

from collections import abc
from dataclasses import replace
from typing import assert_never

from revivemoe.core.agreement import agree
from revivemoe.core.blocks import BlockPool
from revivemoe.core.counters import Counters
from revivemoe.core.journal import Journal, release_all
from revivemoe.core.limits import RankLimits
from revivemoe.core.outcome import Outcome, outcome_of
from revivemoe.core.pace import Pace
from revivemoe.core.queues import Queues
from revivemoe.core.scheduler import Scheduler
from revivemoe.core.sequence import Sequence
from revivemoe.core.slots import ExpertSlots
from revivemoe.core.state import Fenced, InDomain, OpenStep, Parked, RankState, Unconfigured
from revivemoe.core.step import Agreement, Batch, Leave, Park, Run, StepHeader, StepResult
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.placement import EMPTY, Table
from revivemoe.messages.reports import FenceAck, Holdings, RankStats, Tokens
from revivemoe.messages.tally import Tally
from revivemoe.messages.tokens import SequenceSpec


class Rank:
    """Sequences, blocks and step number of one rank. Owns all of `revivemoe.core`'s state."""

    def __init__(
        self,
        rank_id: RankId,
        incarnation: Incarnation,
        limits: RankLimits,
        slots: ExpertSlots | None = None,
    ) -> None:
        """`slots`: filled by whoever drives it; told with every acknowledgement."""
        self.rank_id = rank_id
        self.incarnation = incarnation
        self.limits = limits
        self._slots = slots
        self.state: RankState = Unconfigured()
        self._lay_out()
        self._counters = Counters()
        self._wake = 0
        self._leave = Epoch(0)
        """The epoch to leave for at the next step boundary."""
        self._domain_decodes, self._domain_prefill = False, 0
        """Whether some member decoded in the last step that all agreed on."""

    def _lay_out(self) -> None:
        """Empty blocks and queues, by the limits."""
        limits = self.limits
        self.pool = BlockPool(limits.num_blocks, limits.enable_prefix_caching)
        self.queues = Queues()
        self.tally = Tally()
        """Of the live sequences."""
        self.journal = Journal(self.pool, self.queues)
        self.pace = Pace()
        self._scheduler = Scheduler(limits, self.pool, self.queues, self.journal, self.pace)

    # ---- requests: valid in every state, between steps ---------------------------------------

    def add(self, spec: SequenceSpec) -> None:
        """Take over a sequence. A live `seq_id` is ignored."""
        self._assert_between_steps()
        if spec.seq_id in self.queues.live:
            return
        sequence = Sequence.from_spec(spec)
        self._assert_can_run(sequence)
        self.queues.add(sequence)
        self.tally = self.tally.plus(sequence.seq_id, len(sequence.output_ids))

    def abort(self, seq_id: SeqId) -> None:
        """Forget a sequence and free its blocks. Unknown ids are ignored."""
        self._assert_between_steps()
        if sequence := self.queues.live.get(seq_id):
            self._drop(sequence)

    def wake(self, counter: int) -> None:
        """Somewhere in the domain there is work, unless this counter is an old one."""
        self._wake = max(self._wake, counter)
        if isinstance(self.state, Parked) and self._wake > self.state.wake:
            self.state = InDomain(self.state.epoch, self.state.step, self.state.mask_key)

    # ---- the step ----------------------------------------------------------------------------

    def note_pace(self, batch: Batch, seconds: float) -> None:
        """A step has taken so long, without waits."""
        num_prefill = batch.num_tokens - batch.num_decodes
        if num_prefill == self._domain_prefill:
            self.pace.note(num_prefill, batch.num_decodes, seconds)
        else:
            self.pace.note_shared()

    def begin_step(self) -> Batch:
        """Open a step. Its batch is empty if and only if no sequence is live here."""
        state = self._in_domain()
        assert state.open is None, f"step {state.step} is open already"
        batch = self._scheduler.schedule(state.step, state.mask_key, self._domain_decodes)
        self.state = replace(state, open=OpenStep(batch))
        return batch

    def header(self) -> StepHeader:
        """What the other members have to know about the open step."""
        state, open_step = self._open_step()
        return StepHeader(
            epoch=state.epoch,
            step=state.step,
            num_tokens=open_step.batch.num_tokens,
            has_work=int(bool(self.queues.live)),
            wake=self._wake,
            num_decodes=open_step.batch.num_decodes,
            leave=self._leave,
        )

    def agree(self, headers: abc.Sequence[StepHeader]) -> Agreement:
        """Decide with all members' headers, in logical order, whether the open step is run.

        Park, Retry and Leave close the step without a new number. With the first two all batches
        are empty; after Leave the caller fences this rank to the epoch named.
        Raises `Disagreement` if the members are not at the same step.
        """
        state, open_step = self._open_step()
        agreement = agree(headers)
        self._domain_decodes = any(header.num_decodes for header in headers)
        self._domain_prefill = sum(header.num_tokens - header.num_decodes for header in headers)
        if isinstance(agreement, Run):
            return agreement
        assert isinstance(agreement, Leave) or not open_step.batch.items, (
            "this rank's own header is missing"
        )
        self.roll_back()
        if isinstance(agreement, Park):
            self.state = Parked(state.epoch, state.step, state.mask_key, headers[0].wake)
            self.wake(self._wake)  # One that came between header and agreement must not be lost.
        return agreement

    def mark_executing(self) -> None:
        """From here on the forward may write KV, so that undo cannot restore contents."""
        state, open_step = self._open_step()
        self.state = replace(state, open=replace(open_step, executing=True))

    def commit(self, results: abc.Sequence[StepResult], step_s: float = 0.0) -> Tokens:
        """Make the step's tokens final. `results` are in the order of the batch's items."""
        state, open_step = self._open_step()
        items = open_step.batch.items
        assert open_step.executing or not items, "committed without mark_executing"
        assert len(results) == len(items), f"{len(results)} results for {len(items)} sequences"
        outcomes = [outcome_of(i, r, self.limits) for i, r in zip(items, results, strict=True)]
        # Nothing so far has changed the rank; nothing from here on can fail.
        self._counters.count_step(state.step, self.journal.records, outcomes)
        for outcome in outcomes:
            self._apply(outcome)
        self.journal.clear()
        self.state = replace(state, step=state.step + 1, open=None)
        return self._tokens(state, outcomes, step_s)

    def roll_back(self) -> bool:
        """Undo the open step, if any: as if it had never begun. Returns whether there was one."""
        state = self.state
        if not isinstance(state, InDomain) or state.open is None:
            return False
        self._counters.count_lost(self.journal.roll_back(executed=state.open.executing))
        self.state = replace(state, open=None)
        return True

    # ---- epochs ------------------------------------------------------------------------------

    def leave_at_boundary(self, epoch: Epoch) -> FenceAck | None:
        """Ask to leave every epoch below `epoch` with all members before the next step.

        Outside the step loop (parked, fenced, not configured) there is nothing to wait for: as
        `fence`. The other members of a parked domain are parked, too.
        """
        self._assert_between_steps()
        if not isinstance(self.state, InDomain):
            return self.fence(epoch)
        self._leave = max(self._leave, epoch)
        return None

    def fence(self, epoch: Epoch) -> FenceAck | None:
        """Leave every epoch below `epoch` and say what is held. None if the fence is stale."""
        if self._is_behind(epoch):
            return None
        rolled_back = self.roll_back()
        self._counters.remember_kept(self.queues.live.values())
        next_step = self._next_step()
        self.state = Fenced(epoch, next_step)
        return FenceAck(
            rank=self.rank_id,
            incarnation=self.incarnation,
            epoch=epoch,
            next_step=next_step,
            num_output=self._num_output(),
            rolled_back=rolled_back,
            slots=None if self._slots is None else self._slots.table,
        )

    def configure(self, epoch: Epoch, step: int, mask_key: bytes, wake: int) -> bool:
        """Enter an epoch; `step` is its first. False if it is stale, and nothing is changed."""
        match self.state:
            case InDomain(epoch=current) | Parked(epoch=current):
                assert epoch <= current, "a new epoch begins with a fence"
                return False
            case Fenced(epoch=fenced) if epoch < fenced:
                return False
            case Unconfigured() | Fenced():
                self._enter(epoch, step, mask_key, wake)
                return True
            case _:
                assert_never(self.state)

    def _enter(self, epoch: Epoch, step: int, mask_key: bytes, wake: int) -> None:
        assert step >= self._next_step(), "steps never go back"
        for sequence in self.queues.running:
            # The KV it adds from now on is of another kind: what follows has no name.
            sequence.cacheable = sequence.cacheable and sequence.mask_key == mask_key
        self._wake = max(self._wake, wake)
        self._counters.resume_at(step)
        self.state = InDomain(epoch, step, mask_key)

    def _is_behind(self, epoch: Epoch) -> bool:
        """Whether a fence to `epoch` asks for nothing that has not happened."""
        match self.state:
            case InDomain(epoch=current) | Parked(epoch=current):
                return epoch <= current
            case Fenced(epoch=fenced):
                return epoch < fenced
            case Unconfigured():
                return False
            case _:
                assert_never(self.state)

    def lacks_slots(self, table: Table) -> bool:
        """Whether it has no slots at all, and is to hold some expert."""
        if self._slots is None or self._slots.num_slots:
            return False
        return any(expert != EMPTY for row in table for expert in row)

    def give_up_attention(self) -> None:
        """From now on an expert rank: no sequences, no blocks. Only before the first step of an
        epoch, or outside of any, when what it held has been handed over.
        """
        self._assert_between_steps()
        self.limits = replace(self.limits, num_blocks=0)
        self._lay_out()

    # ---- what others may see -----------------------------------------------------------------

    def holdings(self, request: int) -> Holdings:
        """Answer to `TellHoldings`, between steps."""
        self._assert_between_steps()
        return Holdings(self.rank_id, self.incarnation, request, self._num_output())

    def stats(self) -> RankStats:
        """Load and counters, for the heartbeat."""
        done = self._counters
        return RankStats(
            running=len(self.queues.running),
            waiting=len(self.queues.waiting),
            kv_blocks_used=self.pool.num_blocks - self.pool.num_free,
            kv_blocks_total=self.pool.num_blocks,
            last_step=done.last_step,
            parked=isinstance(self.state, Parked),
            preemptions=done.preemptions,
            prefix_hit_tokens=done.prefix_hit_tokens,
            prefilled_tokens=done.prefilled_tokens,
            survivor_refills=done.survivor_refills,
        )

    def check_invariants(self) -> None:
        """Assert that blocks are conserved and tables, cache and queues agree with each other."""
        self.queues.check()
        self.pool.check(s.block_table for s in self.queues.live.values())
        open_step = isinstance(self.state, InDomain) and self.state.open is not None
        assert open_step or not self.journal.records, "a journal without a step"
        for sequence in self.queues.live.values():
            held, needed = len(sequence.block_table), self.limits.blocks_for(sequence.num_computed)
            assert held == needed or (open_step and held > needed), f"{sequence}: table and KV"
        tally = Tally()
        for seq_id, num_output in self._num_output().items():
            tally = tally.plus(seq_id, num_output)
        assert tally == self.tally, f"{self.tally} is told instead of {tally}"
        for sequence in self.queues.waiting:
            assert not sequence.block_table, f"{sequence}: waits with blocks"

    def _apply(self, outcome: Outcome) -> None:
        sequence = outcome.item.sequence
        sequence.num_computed = outcome.num_computed
        for block, digest in outcome.names:
            self.pool.register(block, digest)
        if outcome.prompt_logprobs:
            sequence.prompt_logprobs_done += len(outcome.prompt_logprobs.entries)
        if outcome.token:
            sequence.append(outcome.token.token_id)
            self.tally = self.tally._replace(num_output=self.tally.num_output + 1)
            if sequence.finished(self.limits.max_model_len):
                self._drop(sequence)

    def _num_output(self) -> dict[SeqId, int]:
        return {s.seq_id: len(s.output_ids) for s in self.queues.live.values()}

    def _drop(self, sequence: Sequence) -> None:
        release_all(self.pool, sequence)
        self.queues.remove(sequence)
        self.tally = self.tally.minus(sequence.seq_id, len(sequence.output_ids))

    def _tokens(self, state: InDomain, outcomes: list[Outcome], step_s: float) -> Tokens:
        return Tokens(
            rank=self.rank_id,
            incarnation=self.incarnation,
            epoch=state.epoch,
            step=state.step,
            tokens=[o.token for o in outcomes if o.token],
            prompt_logprobs=[o.prompt_logprobs for o in outcomes if o.prompt_logprobs],
            step_s=step_s,
        )

    def _next_step(self) -> int:
        match self.state:
            case InDomain(step=step) | Parked(step=step) | Fenced(next_step=step):
                return step
            case Unconfigured():
                return 0
            case _:
                assert_never(self.state)

    def _in_domain(self) -> InDomain:
        assert isinstance(self.state, InDomain), f"no step can begin: {self.state}"
        return self.state

    def _open_step(self) -> tuple[InDomain, OpenStep]:
        state = self._in_domain()
        assert state.open is not None, f"step {state.step} has not begun"
        return state, state.open

    def _assert_between_steps(self) -> None:
        step_open = isinstance(self.state, InDomain) and self.state.open is not None
        assert not step_open, "sequences come and go between steps only"

    def _assert_can_run(self, sequence: Sequence) -> None:
        """The engine refuses such sequences beforehand: no order of steps could finish them."""
        max_output = sequence.params.max_tokens
        longest = min(len(sequence.prompt_ids) + max_output, self.limits.max_model_len)
        # The last token's KV is never needed: nothing is drawn after it. A prompt may be as long as
        # the context; the one token drawn after it is not fed to the model.
        needed = self.limits.blocks_for(max(longest - 1, len(sequence.prompt_ids)))
        assert sequence.history, "a sequence needs at least one token to start from"
        assert sequence.finished(self.limits.max_model_len) is None, "finished before it began"
        assert needed <= self.limits.num_blocks, f"{needed} blocks of {self.limits.num_blocks}"
