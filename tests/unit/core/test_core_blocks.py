"""The block pool and the names of its content."""

import pytest
from core_harness import limits

from revivemoe.core.blocks import BlockPool
from revivemoe.core.digest import Digest, extend_chain

NAME = Digest(b"name")


def chain(tokens: list[int], mask_key: bytes = b"", size: int = 2) -> list[Digest]:
    digests: list[Digest] = []
    extend_chain(digests, mask_key, tokens, size, len(tokens) // size)
    return digests


def test_a_name_covers_all_tokens_before_it_and_the_mask():
    assert chain([1, 2, 3, 4, 5])[:2] == chain([1, 2, 3, 4])
    assert chain([1, 2, 3, 4])[1] != chain([9, 2, 3, 4])[1]
    assert chain([1, 2])[0] != chain([1, 2], mask_key=b"masked")[0]
    assert len({*chain([1, 1, 1, 1, 1, 1])}) == 3


def test_a_chain_is_extended_not_recomputed():
    digests = [Digest(b"given")]
    extend_chain(digests, b"", [1, 2, 3, 4], 2, 2)
    assert digests[0] == b"given"
    with pytest.raises(AssertionError):
        extend_chain(digests, b"", [1, 2, 3, 4, 5], 2, 3)


def test_a_freed_block_is_found_until_it_is_handed_out():
    pool = BlockPool(num_blocks=2)
    block, evicted = pool.allocate()
    assert evicted is None
    pool.register(block, NAME)
    pool.release(block)
    assert pool.find(NAME) == block
    assert pool.allocate() == (1 - block, None)
    assert pool.allocate() == (block, NAME)
    assert pool.find(NAME) is None


def test_nameless_blocks_are_reused_before_named_ones():
    pool = BlockPool(num_blocks=2)
    named, _ = pool.allocate()
    nameless, _ = pool.allocate()
    pool.register(named, NAME)
    pool.release(named)
    pool.release(nameless)
    assert pool.allocate() == (nameless, None)


def test_of_named_blocks_the_one_unused_for_longest_goes_first():
    pool = BlockPool(num_blocks=2)
    blocks = [pool.allocate()[0] for _ in range(2)]
    for block in blocks:
        pool.register(block, Digest(bytes([block])))
        pool.release(block)
    pool.reference(blocks[0])
    pool.release(blocks[0])
    assert pool.allocate()[0] == blocks[1]


def test_undone_allocations_restore_names_and_order():
    pool = BlockPool(num_blocks=3)
    block, _ = pool.allocate()
    pool.register(block, NAME)
    pool.release(block)
    taken = [pool.allocate() for _ in range(3)]
    for given in reversed(taken):
        pool.undo_allocate(*given)
    assert pool.find(NAME) == block
    assert [pool.allocate() for _ in range(3)] == taken


def test_two_holders_free_a_block_once():
    pool = BlockPool(num_blocks=1)
    block, _ = pool.allocate()
    pool.reference(block)
    pool.release(block)
    assert pool.num_free == 0
    pool.check([[block]])
    pool.release(block)
    assert pool.num_free == 1
    with pytest.raises(AssertionError):
        pool.release(block)


def test_the_first_block_of_a_name_keeps_it():
    pool = BlockPool(num_blocks=2)
    first, second = pool.allocate()[0], pool.allocate()[0]
    pool.register(first, NAME)
    pool.register(second, NAME)
    assert pool.cached() == {NAME: first}


def test_without_caching_nothing_has_a_name():
    pool = BlockPool(num_blocks=1, enable_prefix_caching=False)
    block, _ = pool.allocate()
    pool.register(block, NAME)
    assert pool.find(NAME) is None


def test_check_finds_a_block_that_nobody_names():
    pool = BlockPool(num_blocks=1)
    pool.allocate()
    with pytest.raises(AssertionError, match="reference count"):
        pool.check([])


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"num_blocks": -1}, {"max_num_seqs": 17}])
def test_limits_that_could_starve_a_sequence_are_refused(bad: dict[str, int]):
    limits()
    with pytest.raises(ValueError, match=r"max_num|positive"):
        limits(**bad)
