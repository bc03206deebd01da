"""The shared-memory transport's refusals and layout, with several members in one process."""

import itertools
import os
import platform
import threading
from collections.abc import Iterator

import pytest
import torch

from revivemoe.comm.fence import DomainLeft, FenceFlag
from revivemoe.comm.shm import Segment, ShmTransport, create_segment, region_bytes_for
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

BOTH = (RankId(0), RankId(1))


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = create_segment(3, region_bytes_for(3, 1024))
    yield descriptor
    os.close(descriptor)


def enter(fd: int, rank: int, epoch: int = 1, members=BOTH, timeout_s=5.0) -> ShmTransport:
    waiter = Waiter(FenceFlag(), Epoch(epoch), timeout_s)
    return ShmTransport(Segment(fd), waiter, Epoch(epoch), members, RankId(rank))


def test_halves_of_all_ranks_and_epochs_are_disjoint_and_inside(fd):
    segment = Segment(fd)
    starts = sorted(
        segment.half_offset(RankId(rank), Epoch(epoch), 0, parity)
        for rank in range(3)
        for epoch in (4, 5)
        for parity in (0, 1)
    )
    half = segment.region_bytes // 2
    assert all(b - a >= half for a, b in itertools.pairwise(starts))
    assert starts[0] > 8 * segment.epoch_line(RankId(2))
    assert starts[-1] + half == len(segment.bytes)
    assert all(start % 64 == 0 for start in starts)


def test_pages_cost_nothing_before_they_are_written():
    descriptor = create_segment(64, 1 << 30)
    try:
        assert os.fstat(descriptor).st_size > 100 << 30
        assert os.fstat(descriptor).st_blocks * 512 <= 1 << 16
    finally:
        os.close(descriptor)


def test_the_largest_payload_fits_and_one_byte_more_is_refused(fd):
    transport = enter(fd, 0)
    payload = transport._payload_bytes
    assert payload >= 1024
    assert transport.outbox(1, [0, payload]).shape == (payload, 1)
    with pytest.raises(AssertionError, match="exceed the region"):
        transport.outbox(1, [0, payload + 1])


def test_an_epoch_is_entered_once(fd):
    enter(fd, 0, epoch=3)
    with pytest.raises(AssertionError, match="twice"):
        enter(fd, 0, epoch=3)


def test_a_zombie_leaves_by_itself_before_it_writes(fd):
    zombie = enter(fd, 1, epoch=1)
    enter(fd, 0, epoch=2, members=(RankId(0), RankId(2)))
    before = Segment(fd).bytes.clone()
    with pytest.raises(DomainLeft, match="rank has entered epoch 2"):
        zombie.outbox(8, [1, 1])
    with pytest.raises(DomainLeft):
        zombie.all_gather_ints([1])
    with pytest.raises(DomainLeft):
        enter(fd, 1, epoch=1)
    assert torch.equal(before, Segment(fd).bytes)


def test_words_of_an_older_epoch_are_not_current(fd):
    """Epochs 1 and 3 share an area: what epoch 1 left behind must not satisfy a wait of epoch 3."""
    first = [enter(fd, rank, epoch=1) for rank in (0, 1)]
    other = threading.Thread(target=first[1].all_gather_ints, args=([10],))
    other.start()
    assert first[0].all_gather_ints([20]) == [[20], [10]]
    other.join()
    third = enter(fd, 0, epoch=3, timeout_s=0.1)
    with pytest.raises(Exception, match="nothing from rank 1"):
        third.all_gather_ints([30])


def test_a_closed_transport_is_of_no_use(fd):
    transport = enter(fd, 0)
    transport.close()
    transport.close()
    with pytest.raises(AssertionError, match="closed"):
        transport.all_gather_ints([1])


def test_other_machines_and_descriptors_are_refused(fd, monkeypatch):
    other = os.memfd_create("other")
    os.write(other, bytes(64))
    with pytest.raises(ValueError, match="not a segment"):
        Segment(other)
    os.close(other)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="use --transport gloo"):
        Segment(fd)
