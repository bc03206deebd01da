"""Continuous batching with chunked prefill: which tokens of which sequences run in a step."""

from dataclasses import dataclass, field

from revivemoe.core.blocks import BlockPool
from revivemoe.core.journal import Journal
from revivemoe.core.limits import RankLimits
from revivemoe.core.pace import GENTLE, USUAL, Pace
from revivemoe.core.queues import Queues
from revivemoe.core.sequence import Sequence
from revivemoe.core.step import Batch, ScheduledSequence
from revivemoe.ids import BlockId


@dataclass
class Scheduler:
    """Chooses the next batch. Everything it changes goes through the journal.

    The oldest comes first throughout: it gets blocks first and is preempted last. The oldest
    running sequence can always have every block, and a sequence fits alone (checked when it is
    added), so a rank with live sequences always schedules at least one token.
    """

    _limits: RankLimits
    _pool: BlockPool
    _queues: Queues
    _journal: Journal
    _pace: Pace = field(default_factory=Pace)

    def schedule(self, step: int, mask_key: bytes, beside_decodes: bool = False) -> Batch:
        """The batch of the next step; empty only if no sequence is live.

        `beside_decodes`: some member of the domain decodes, so prefill keeps its bound.
        """
        budget = self._budget(beside_decodes)
        items = self._schedule_running(budget)
        budget -= sum(item.count for item in items)
        items += self._admit_waiting(budget, mask_key)
        assert items or not self._queues.live, "live sequences, but nothing was scheduled"
        return Batch(step=step, items=tuple(items))

    def _budget(self, beside_decodes: bool) -> int:
        most = self._limits.max_num_batched_tokens
        bound = self._limits.prefill_tokens_beside_decodes
        if bound is None or not beside_decodes:
            return most
        bound = bound or self._pace.prefill_tokens(GENTLE if self._refills() else USUAL, most)
        ready = sum(sequence.num_remaining == 1 for sequence in self._queues.running)
        return min(most, ready + bound)

    def _refills(self) -> bool:
        """Whether a sequence that has put out tokens is computed again: moved, or preempted."""
        every = (*self._queues.running, *self._queues.waiting)
        return any(s.output_ids and s.num_remaining > 1 for s in every)

    def _schedule_running(self, budget: int) -> list[ScheduledSequence]:
        """Shares of the running sequences, as far as the budget goes.

        Visited by age, so whoever is preempted (the youngest) has no share yet. Decoding goes on
        beside long prefills because one token is kept back for every decode still to come; the
        budget exceeds their number, so the oldest prefill gets a token as well.
        """
        running = self._queues.running
        reserved = sum(sequence.num_remaining == 1 for sequence in running)
        items: list[ScheduledSequence] = []
        index = 0
        while index < len(running):
            sequence = running[index]
            reserved -= sequence.num_remaining == 1
            count = min(sequence.num_remaining, budget - reserved)
            if count > 0:
                if not self._make_room(sequence, count):
                    break
                items.append(_share(sequence, count))
                budget -= count
            index += 1
        return items

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from the youngest. False: that was itself."""
        end = sequence.num_computed + count
        missing = self._limits.blocks_for(end) - len(sequence.block_table)
        while self._pool.num_free < missing:
            victim = self._queues.running[-1]
            assert victim is not self._queues.running[0], "a sequence does not fit alone"
            self._journal.preempt(victim)
            if victim is sequence:
                return False
        for _ in range(missing):
            self._journal.allocate(sequence)
        return True

    def _admit_waiting(self, budget: int, mask_key: bytes) -> list[ScheduledSequence]:
        """Admit by age while there is room; nobody overtakes, so nobody starves.

        Room means blocks for the whole known history, though the first chunk may need fewer: an
        admission that soon ends in a preemption is not worth its prefill. Running sequences have
        theirs: what they leave of the budget, they have no use for. Nor is a sequence admitted
        that was preempted just now: less is free than it had.
        """
        running, waiting = self._queues.running, self._queues.waiting
        items: list[ScheduledSequence] = []
        while waiting and budget > 0 and len(running) < self._limits.max_num_seqs:
            sequence = waiting[0]
            cached = self._cached_prefix(sequence, mask_key)
            held_by_others = sum(not self._pool.is_free(block) for block in cached)
            needed = self._limits.blocks_for(len(sequence.history)) - held_by_others
            if needed > self._pool.num_free:
                break
            self._journal.admit(sequence, cached, len(cached) * self._limits.block_size)
            count = min(sequence.num_remaining, budget)
            roomy = self._make_room(sequence, count)
            assert roomy, "admitted without room"
            items.append(_share(sequence, count))
            budget -= count
        return items

    def _cached_prefix(self, sequence: Sequence, mask_key: bytes) -> list[BlockId]:
        """Cached blocks that hold the beginning of a waiting sequence's history."""
        sequence.rebase(mask_key)
        if not self._limits.enable_prefix_caching:
            return []
        size = self._limits.block_size
        cached: list[BlockId] = []
        for digest in sequence.block_digests(size, sequence.max_cached_tokens // size):
            block = self._pool.find(digest)
            if block is None:
                break
            cached.append(block)
        return cached


def _share(sequence: Sequence, count: int) -> ScheduledSequence:
    start = sequence.num_computed
    return ScheduledSequence(
        sequence=sequence,
        start=start,
        count=count,
        block_table=tuple(sequence.block_table),
        samples=start + count == len(sequence.history),
    )
