"""A KV cache that remembers what was written into it, for tests and the simulation.

Real KV cannot be checked: any floats look alike. Here each slot holds what its KV would depend on,
and each read is compared with what the reader believes to be there.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from revivemoe.core.digest import Digest, extend_chain
from revivemoe.core.sequence import Sequence
from revivemoe.core.step import Batch, ScheduledSequence
from revivemoe.ids import BlockId


@dataclass(frozen=True, slots=True)
class Slot:
    """What the KV of one token depends on. No sequence id: prefix sharing is legal."""

    position: int
    token: int
    prefix: bytes
    """Digest of the token history up to and including this position."""
    mask_keys: frozenset[bytes]
    """Masks under which this token and all that it attended to were computed."""


class FakeKv:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[BlockId, int], Slot] = {}
        self._names: dict[tuple[bytes, bytes], Digest] = {}
        """What KV of (history digest, mask key) is to be called, if it ends a block."""

    def write(self, batch: Batch, mask_key: bytes, max_tokens: int | None = None) -> None:
        """Write the slots of a batch, or of its first tokens only: a forward that was cut off.

        `mask_key` is that of the rank's epoch: it says how the batch is computed.
        """
        left = batch.num_tokens if max_tokens is None else max_tokens
        for item in batch.items:
            count = min(item.count, left)
            self._write_item(item, count, mask_key)
            left -= count

    def check(self, batch: Batch) -> None:
        """Assert that each item reads the KV of its own history in [0, start)."""
        for item in batch.items:
            covered = len(item.block_table) * self._block_size
            assert covered >= item.start + item.count, f"{item}: the table is too short"
            self._check_reads(item.sequence, item.block_table, item.start)

    def check_sequence(self, sequence: Sequence) -> None:
        """Assert the same for everything a sequence counts as computed."""
        self._check_reads(sequence, tuple(sequence.block_table), sequence.num_computed)

    def check_cache(self, cached: dict[Digest, BlockId]) -> None:
        """Assert that each named block is full of KV of one mask, in line, and named for it."""
        for digest, block in cached.items():
            slots = [self._slots.get((block, offset)) for offset in range(self._block_size)]
            last = slots[-1]
            assert last is not None, f"block {block} has a name but is not full"
            assert len(last.mask_keys) == 1, f"block {block} has a name, but KV of several masks"
            self._check_in_line(block, slots)
            (mask_key,) = last.mask_keys
            assert self._names[last.prefix, mask_key] == digest, f"block {block} is misnamed"

    def _write_item(self, item: ScheduledSequence, count: int, mask_key: bytes) -> None:
        history, size = item.sequence.history, self._block_size
        prefixes = _prefixes(history[: item.start + count])
        mask_keys = frozenset({mask_key})
        if item.start > 0:
            mask_keys |= self._slots[self._place(item.block_table, item.start - 1)].mask_keys
        names: list[Digest] = []
        extend_chain(names, mask_key, history, size, (item.start + count) // size)
        for p in range(item.start, item.start + count):
            slot = Slot(p, history[p], prefixes[p], mask_keys)
            self._slots[self._place(item.block_table, p)] = slot
            if (p + 1) % size == 0:
                self._names[prefixes[p], mask_key] = names[p // size]

    def _check_in_line(self, block: BlockId, slots: list[Slot | None]) -> None:
        """Each slot of the block continues the one before it."""
        previous = slots[0]
        assert previous is not None, f"block {block} has a name but is not full"
        assert previous.position % self._block_size == 0
        for slot in slots[1:]:
            assert slot is not None, f"block {block} has a name but is not full"
            expected = Slot(
                position=previous.position + 1,
                token=slot.token,
                prefix=_extend(previous.prefix, slot.token),
                mask_keys=previous.mask_keys,
            )
            assert slot == expected, f"block {block} has a name, but {slot} is not {expected}"
            previous = slot

    def _check_reads(self, sequence: Sequence, table: tuple[BlockId, ...], end: int) -> None:
        prefixes = _prefixes(sequence.history[:end])
        for p in range(end):
            slot = self._slots.get(self._place(table, p))
            where = f"sequence {sequence.seq_id}, position {p}"
            assert slot is not None, f"{where}: reads a slot never written"
            assert (slot.position, slot.prefix) == (p, prefixes[p]), (
                f"{where}: reads KV of another history: {slot}"
            )
            # A sequence that lived through a change of mask has KV of both, and shares none.
            own_mask = not sequence.cacheable or slot.mask_keys == {sequence.mask_key}
            assert own_mask, f"{where}: reads KV of masks {slot.mask_keys}"

    def _place(self, table: tuple[BlockId, ...], position: int) -> tuple[BlockId, int]:
        return table[position // self._block_size], position % self._block_size


@lru_cache(maxsize=1 << 16)
def _extend(prefix: bytes, token: int) -> bytes:
    return blake2b(prefix + token.to_bytes(4, "little"), digest_size=8).digest()


def _prefixes(tokens: list[int]) -> list[bytes]:
    """Digest of the history up to each position."""
    prefixes: list[bytes] = []
    for token in tokens:
        prefixes.append(_extend(prefixes[-1] if prefixes else b"", token))
    return prefixes
