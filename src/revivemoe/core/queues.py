"""Live sequences of one rank: waiting for blocks, or running with them. Both oldest first."""

from bisect import insort
from operator import attrgetter

from revivemoe.core.sequence import Sequence
from revivemoe.ids import SeqId

_ORDER = attrgetter("order")


class Queues:
    """Every live sequence is in exactly one of two lists, sorted by arrival."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.live: dict[SeqId, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Take in a new sequence: it waits in its place by arrival."""
        assert sequence.seq_id not in self.live
        self.live[sequence.seq_id] = sequence
        insort(self.waiting, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        del self.live[sequence.seq_id]
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)

    def to_running(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_ORDER)

    def to_waiting(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_ORDER)

    def check(self) -> None:
        """Assert that the lists are sorted and hold each live sequence once."""
        both = [*self.waiting, *self.running]
        assert len(both) == len(self.live)
        assert {s.seq_id: s for s in both} == self.live
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_ORDER)
