"""What a rank has done so far, counted at commit: a step that is undone was never done."""

from collections import abc

from revivemoe.core.journal import Admitted, Preempted, Record
from revivemoe.core.outcome import Outcome
from revivemoe.core.sequence import Sequence
from revivemoe.ids import SeqId
from revivemoe.messages.reports import RankStats


class Counters:
    """Totals over the life of the process."""

    def __init__(self) -> None:
        self._last_step = 0
        self._preemptions = 0
        self._prefix_hit_tokens = 0
        self._prefilled_tokens = 0
        self._survivor_refills = 0
        self._kept_at_fence: dict[SeqId, int] = {}
        """Tokens whose KV each sequence brought over the last fence. Outlives an abort, so that
        an abort followed by an add of the same sequence shows as the waste that it is."""

    def resume_at(self, step: int) -> None:
        """The instance, if not this process, has done all steps before this one."""
        self._last_step = max(self._last_step, step - 1)

    def count_step(
        self, step: int, records: abc.Iterable[Record], outcomes: abc.Iterable[Outcome]
    ) -> None:
        """Count one committed step. The outcomes have not been applied yet."""
        self._last_step = step
        for record in records:
            if isinstance(record, Admitted):
                self._prefix_hit_tokens += record.num_cached_tokens
            elif isinstance(record, Preempted):
                self.count_lost([record.sequence])
        for outcome in outcomes:
            self._prefilled_tokens += outcome.num_prefilled
            self._count_refill(outcome)

    def count_lost(self, preempted: abc.Iterable[Sequence]) -> None:
        """Count preemptions: their sequences compute again for want of blocks, not by a fence."""
        for sequence in preempted:
            self._preemptions += 1
            self._kept_at_fence.pop(sequence.seq_id, None)

    def remember_kept(self, live: abc.Iterable[Sequence]) -> None:
        """Note at a fence what need not be computed again on this rank."""
        before = self._kept_at_fence
        kept = {s.seq_id: max(s.num_computed, before.get(s.seq_id, 0)) for s in live}
        self._kept_at_fence = {seq_id: tokens for seq_id, tokens in kept.items() if tokens}

    def stats(
        self, running: int, waiting: int, kv_blocks_used: int, kv_blocks_total: int, parked: bool
    ) -> RankStats:
        """The totals beside the present load."""
        return RankStats(
            running=running,
            waiting=waiting,
            kv_blocks_used=kv_blocks_used,
            kv_blocks_total=kv_blocks_total,
            last_step=self._last_step,
            parked=parked,
            preemptions=self._preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefilled_tokens=self._prefilled_tokens,
            survivor_refills=self._survivor_refills,
        )

    def _count_refill(self, outcome: Outcome) -> None:
        kept = self._kept_at_fence.get(outcome.item.sequence.seq_id, 0)
        self._survivor_refills += max(0, min(kept, outcome.num_computed) - outcome.item.start)
