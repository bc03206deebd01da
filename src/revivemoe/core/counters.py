"""What a rank has done so far, counted at commit: a step that is undone was never done."""

from collections import abc
from dataclasses import dataclass, field

from revivemoe.core.journal import Admitted, Preempted, Record
from revivemoe.core.outcome import Outcome
from revivemoe.core.sequence import Sequence
from revivemoe.ids import SeqId


@dataclass
class Counters:
    """Totals over the life of the process, named as in `RankStats`."""

    last_step: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefilled_tokens: int = 0
    survivor_refills: int = 0
    _kept_at_fence: dict[SeqId, int] = field(default_factory=dict)
    """Tokens whose KV each sequence brought over the last fence. Outlives an abort, so that
    an abort followed by an add of the same sequence shows as the waste that it is."""

    def resume_at(self, step: int) -> None:
        """The instance, if not this process, has done all steps before this one."""
        self.last_step = max(self.last_step, step - 1)

    def count_step(
        self, step: int, records: abc.Iterable[Record], outcomes: abc.Iterable[Outcome]
    ) -> None:
        """Count one committed step. The outcomes have not been applied yet."""
        self.last_step = step
        for record in records:
            if isinstance(record, Admitted):
                self.prefix_hit_tokens += record.num_cached_tokens
            elif isinstance(record, Preempted):
                self.count_lost([record.sequence])
        for outcome in outcomes:
            self.prefilled_tokens += outcome.num_prefilled
            kept = self._kept_at_fence.get(outcome.item.sequence.seq_id, 0)
            self.survivor_refills += max(0, min(kept, outcome.num_computed) - outcome.item.start)

    def count_lost(self, preempted: abc.Iterable[Sequence]) -> None:
        """Count preemptions: their sequences compute again for want of blocks, not by a fence."""
        for sequence in preempted:
            self.preemptions += 1
            self._kept_at_fence.pop(sequence.seq_id, None)

    def remember_kept(self, live: abc.Iterable[Sequence]) -> None:
        """Note at a fence what need not be computed again on this rank."""
        before = self._kept_at_fence
        kept = {s.seq_id: max(s.num_computed, before.get(s.seq_id, 0)) for s in live}
        self._kept_at_fence = {seq_id: tokens for seq_id, tokens in kept.items() if tokens}
