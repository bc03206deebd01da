"""Who holds which KV block, and which blocks hold KV that others may share (the prefix cache)."""

from collections import OrderedDict
from collections.abc import Iterable

from revivemoe.core.digest import Digest
from revivemoe.ids import BlockId


class BlockPool:
    """Reference counts, the free list, and names of full blocks of committed KV.

    A freed block keeps its name, and so can be found and shared again, until it is handed out for
    new content. The free list is therefore ordered: what is least worth keeping comes first.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(
            BlockId(b) for b in range(num_blocks)
        )
        self._block_of_digest: dict[Digest, BlockId] = {}
        self._digest_of_block: dict[BlockId, Digest] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: BlockId) -> bool:
        return self._ref_counts[block] == 0

    def cached(self) -> dict[Digest, BlockId]:
        """A copy of the prefix cache: name to block."""
        return dict(self._block_of_digest)

    def find(self, digest: Digest) -> BlockId | None:
        """The block that holds the KV of this name."""
        return self._block_of_digest.get(digest)

    def allocate(self) -> tuple[BlockId, Digest | None]:
        """Hand out the first free block for new content; also the name it loses by that."""
        block, _ = self._free.popitem(last=False)
        self._ref_counts[block] = 1
        evicted = self._digest_of_block.pop(block, None)
        if evicted is not None:
            del self._block_of_digest[evicted]
        return block, evicted

    def undo_allocate(self, block: BlockId, evicted: Digest | None) -> None:
        """Take back a block handed out in the open step; `evicted` is the name to give back.

        Undone in reverse, pushing to the front restores the order of the free list.
        """
        assert self._ref_counts[block] == 1, f"block {block} has been shared within its first step"
        self._ref_counts[block] = 0
        self._free[block] = None
        self._free.move_to_end(block, last=False)
        if evicted is not None:
            self._name(block, evicted)

    def reference(self, block: BlockId) -> None:
        """Hold a block whose content is to be read, free or not."""
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, block: BlockId) -> None:
        """Let go of a block. Nameless content is of no further use: its block is reused first."""
        assert self._ref_counts[block] > 0, f"block {block} is free already"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if block not in self._digest_of_block:
                self._free.move_to_end(block, last=False)

    def register(self, block: BlockId, digest: Digest) -> None:
        """Name a full block of committed KV. The first block of a name keeps it."""
        assert self._ref_counts[block] > 0, f"block {block} is free: its KV is not committed"
        if self._caching and digest not in self._block_of_digest:
            self._name(block, digest)

    def _name(self, block: BlockId, digest: Digest) -> None:
        assert block not in self._digest_of_block, f"block {block} has a name already"
        assert digest not in self._block_of_digest, "two blocks of one name"
        self._block_of_digest[digest] = block
        self._digest_of_block[block] = digest

    def check(self, tables: Iterable[list[BlockId]]) -> None:
        """Assert that blocks are conserved and counted once for each table that names them."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        if counts != self._ref_counts:  # seldom, so the block is looked for only then
            wrong = [b for b, n in enumerate(counts) if n != self._ref_counts[b]]
            raise AssertionError(f"blocks {wrong}: wrong reference counts")
        held = {BlockId(b) for b, count in enumerate(counts) if count}
        assert held.isdisjoint(self._free), f"free and held: {held & self._free.keys()}"
        assert len(held) + len(self._free) == self.num_blocks, "neither free nor held"
        assert {b: d for d, b in self._block_of_digest.items()} == self._digest_of_block
