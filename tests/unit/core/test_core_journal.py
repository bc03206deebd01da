"""Undo of single operations: tables come back, contents that may be overwritten do not."""

import pytest
from core_harness import spec

from revivemoe.core.blocks import BlockPool
from revivemoe.core.digest import Digest
from revivemoe.core.journal import Journal
from revivemoe.core.queues import Queues
from revivemoe.core.sequence import Sequence


class Bench:
    """A pool of four blocks; `old` and `young` are running with two blocks each."""

    def __init__(self) -> None:
        self.pool = BlockPool(num_blocks=4)
        self.queues = Queues()
        self.journal = Journal(self.pool, self.queues)
        self.old, self.young = self._running(0), self._running(1)
        self.journal.clear()

    def _running(self, seq_id: int) -> Sequence:
        sequence = Sequence.from_spec(spec(seq_id, [1, 2, 3, 4]))
        self.queues.add(sequence)
        self.journal.admit(sequence, [], 0)
        for _ in range(2):
            self.journal.allocate(sequence)
        sequence.num_computed = 4
        return sequence

    def check(self) -> None:
        self.queues.check()
        self.pool.check([self.old.block_table, self.young.block_table])


@pytest.mark.parametrize("executed", [False, True])
def test_a_preempted_sequence_whose_blocks_are_untouched_goes_on(executed: bool):
    bench = Bench()
    table = list(bench.young.block_table)
    bench.journal.preempt(bench.young)
    assert bench.queues.waiting == [bench.young]
    assert bench.young.num_computed == 0
    assert bench.journal.roll_back(executed) == []
    assert (bench.young.block_table, bench.young.num_computed) == (table, 4)
    assert bench.queues.running == [bench.old, bench.young]
    bench.check()


def test_a_preempted_sequence_whose_block_was_overwritten_starts_again():
    bench = Bench()
    bench.journal.preempt(bench.young)
    bench.journal.allocate(bench.old)
    assert bench.journal.roll_back(executed=True) == [bench.young]
    assert (bench.young.block_table, bench.young.num_computed) == ([], 0)
    assert bench.queues.waiting == [bench.young]
    assert len(bench.old.block_table) == 2
    bench.check()


def test_before_the_forward_even_a_reallocated_block_comes_back():
    bench = Bench()
    table = list(bench.young.block_table)
    bench.journal.preempt(bench.young)
    bench.journal.allocate(bench.old)
    assert bench.journal.roll_back(executed=False) == []
    assert (bench.young.block_table, bench.young.num_computed) == (table, 4)
    bench.check()


def test_a_block_that_was_overwritten_before_its_holder_lost_it_does_not_matter():
    """The block was new to the step: what stood in it before was nobody's."""
    bench = Bench()
    bench.journal.preempt(bench.old)
    bench.journal.clear()
    bench.journal.allocate(bench.young)
    bench.journal.preempt(bench.young)
    assert bench.journal.roll_back(executed=True) == []
    assert len(bench.young.block_table) == 2
    assert bench.young.num_computed == 4
    bench.check()


@pytest.mark.parametrize("executed", [False, True])
def test_an_evicted_name_comes_back_only_if_nothing_was_written(executed: bool):
    bench = Bench()
    name, block = Digest(b"name"), bench.young.block_table[0]
    bench.pool.register(block, name)
    bench.journal.preempt(bench.young)
    bench.journal.clear()
    for _ in range(2):
        bench.journal.allocate(bench.old)
    assert bench.pool.find(name) is None
    bench.journal.roll_back(executed)
    assert bench.pool.find(name) == (None if executed else block)
    bench.check()


@pytest.mark.parametrize("executed", [False, True])
def test_an_admission_is_undone_and_its_shared_blocks_stay_cached(executed: bool):
    bench = Bench()
    name, block = Digest(b"name"), bench.young.block_table[0]
    bench.pool.register(block, name)
    bench.journal.preempt(bench.young)
    bench.journal.clear()
    bench.journal.admit(bench.young, [block], 2)
    assert bench.young.num_computed == 2
    bench.journal.roll_back(executed)
    assert (bench.young.block_table, bench.young.num_computed) == ([], 0)
    assert bench.pool.find(name) == block
    assert bench.pool.is_free(block)
    bench.check()


@pytest.mark.parametrize("executed", [False, True])
def test_preempted_readmitted_and_overwritten_within_one_step(executed: bool):
    bench = Bench()
    table = list(bench.young.block_table)
    bench.young.cacheable = False
    bench.journal.preempt(bench.young)
    bench.journal.admit(bench.young, [], 0)
    bench.journal.allocate(bench.young)
    lost = bench.journal.roll_back(executed)
    assert lost == ([bench.young] if executed else [])
    assert bench.young.block_table == ([] if executed else table)
    assert executed or not bench.young.cacheable
    bench.check()


def test_grown_preempted_and_overwritten_within_one_step():
    bench = Bench()
    bench.journal.preempt(bench.old)
    bench.journal.admit(bench.old, [], 0)
    bench.journal.clear()
    bench.journal.allocate(bench.young)
    bench.journal.preempt(bench.young)
    for _ in range(4):
        bench.journal.allocate(bench.old)
    assert bench.journal.roll_back(executed=True) == [bench.young]
    assert (bench.young.block_table, bench.young.num_computed) == ([], 0)
    assert bench.pool.num_free == 4
    bench.check()
