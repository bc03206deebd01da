"""The undo log of one step (ReviveMoE, section 3.3): every block and queue operation, typed.

Undo restores tables, not contents. Once the forward has begun, blocks handed out in the step may
have been overwritten, and whatever they held before is gone: a name evicted from them stays
evicted, and a preempted sequence that owned one of them cannot have its KV back.
"""

from dataclasses import dataclass
from typing import assert_never

from revivemoe.core.blocks import BlockPool
from revivemoe.core.digest import Digest
from revivemoe.core.queues import Queues
from revivemoe.core.sequence import Sequence
from revivemoe.ids import BlockId


@dataclass(frozen=True, slots=True)
class Allocated:
    """A block for new content was appended to the table; it lost the name `evicted`."""

    sequence: Sequence
    block: BlockId
    evicted: Digest | None


@dataclass(frozen=True, slots=True)
class Shared:
    """A block found in the prefix cache was referenced and appended to the table."""

    sequence: Sequence
    block: BlockId


@dataclass(frozen=True, slots=True)
class Admitted:
    """The sequence went from waiting to running, with this many tokens from the cache."""

    sequence: Sequence
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence went from running to waiting and let go of these blocks."""

    sequence: Sequence
    num_computed: int
    blocks: tuple[BlockId, ...]
    mask_key: bytes
    cacheable: bool


Record = Allocated | Shared | Admitted | Preempted


class Journal:
    """Does the operations of a step and remembers how to undo them."""

    def __init__(self, pool: BlockPool, queues: Queues) -> None:
        self._pool = pool
        self._queues = queues
        self.records: list[Record] = []

    def admit(self, sequence: Sequence, cached: list[BlockId], num_cached_tokens: int) -> None:
        """Waiting to running, reading the first tokens' KV from `cached` blocks."""
        self._queues.to_running(sequence)
        self.records.append(Admitted(sequence, num_cached_tokens))
        for block in cached:
            self._pool.reference(block)
            sequence.block_table.append(block)
            self.records.append(Shared(sequence, block))
        sequence.num_computed = num_cached_tokens
        sequence.cacheable = True

    def allocate(self, sequence: Sequence) -> None:
        """Append one block for new content to the table."""
        block, evicted = self._pool.allocate()
        sequence.block_table.append(block)
        self.records.append(Allocated(sequence, block, evicted))

    def preempt(self, sequence: Sequence) -> None:
        """Running to waiting; its KV is given up and will be computed again."""
        self._queues.to_waiting(sequence)
        blocks = tuple(sequence.block_table)
        self.records.append(
            Preempted(
                sequence, sequence.num_computed, blocks, sequence.mask_key, sequence.cacheable
            )
        )
        release_all(self._pool, sequence)

    def clear(self) -> None:
        """The step is committed: nothing of it will be undone."""
        self.records.clear()

    def roll_back(self, executed: bool) -> list[Sequence]:
        """Undo the step in reverse. Returns preempted sequences whose KV could not be restored.

        `executed`: whether the forward had begun, so that blocks allocated here may be written.
        """
        undo = _Undo(self._pool, self._queues, executed)
        while self.records:
            undo(self.records.pop())
        return undo.lost


class _Undo:
    """Undoes records from the newest to the oldest."""

    def __init__(self, pool: BlockPool, queues: Queues, executed: bool) -> None:
        self._pool = pool
        self._queues = queues
        self._executed = executed
        self._overwritten: set[BlockId] = set()
        """Blocks handed out after the record being undone, whose content is therefore gone."""
        self.lost: list[Sequence] = []

    def __call__(self, record: Record) -> None:
        if record.sequence in self.lost:
            return  # It has no blocks and waits already; what it did before does not matter.
        match record:
            case Allocated(sequence, block, evicted):
                self._take_back(sequence, block, evicted)
            case Shared(sequence, block):
                _drop_last(sequence, block)
                self._pool.release(block)
            case Admitted(sequence, _):
                sequence.num_computed = 0
                self._queues.to_waiting(sequence)
            case Preempted():
                self._readmit(record)
            case _:
                assert_never(record)

    def _take_back(self, sequence: Sequence, block: BlockId, evicted: Digest | None) -> None:
        _drop_last(sequence, block)
        self._pool.undo_allocate(block, None if self._executed else evicted)
        if self._executed:
            self._overwritten.add(block)

    def _readmit(self, record: Preempted) -> None:
        sequence = record.sequence
        if not self._overwritten.isdisjoint(record.blocks):
            self.lost.append(sequence)
            return
        for block in record.blocks:
            self._pool.reference(block)
        sequence.block_table.extend(record.blocks)
        sequence.num_computed = record.num_computed
        sequence.rebase(record.mask_key)
        sequence.cacheable = record.cacheable
        self._queues.to_running(sequence)


def _drop_last(sequence: Sequence, block: BlockId) -> None:
    dropped = sequence.block_table.pop()
    assert dropped == block, "the journal does not match the table"


def release_all(pool: BlockPool, sequence: Sequence) -> None:
    """Let go of a sequence's KV, the end of its history first: prefixes are worth most."""
    for block in reversed(sequence.block_table):
        pool.release(block)
    sequence.block_table.clear()
    sequence.num_computed = 0
