"""The flag, the wait and the error: one process, no transport."""

import threading
import time

import pytest

from revivemoe.comm.fence import CommunicationFailed, DomainLeft, FenceFlag
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId


def never() -> bool:
    return False


def nobody() -> tuple[RankId, ...]:
    return ()


def test_the_flag_only_rises():
    fence = FenceFlag()
    assert not fence.covers(Epoch(0))
    fence.raise_to(Epoch(3))
    fence.raise_to(Epoch(1))
    assert [fence.covers(Epoch(e)) for e in (1, 2, 3, 4)] == [True, True, False, False]


def test_a_fenced_wait_is_left_even_if_it_could_succeed():
    fence = FenceFlag()
    fence.raise_to(Epoch(1))
    with pytest.raises(DomainLeft, match="epoch 0 is fenced"):
        Waiter(fence, Epoch(0), 1.0).until(lambda: True, "x", nobody)


def test_a_wait_is_left_when_another_thread_raises_the_fence():
    fence = FenceFlag()
    timer = threading.Timer(0.1, fence.raise_to, [Epoch(1)])
    waiter = Waiter(fence, Epoch(0), 30.0)
    started = time.monotonic()
    timer.start()
    with pytest.raises(DomainLeft):
        waiter.until(never, "x", nobody)
    assert 0.05 < time.monotonic() - started < 5
    assert 0.05 < waiter.waited_s < 5


def test_a_time_out_says_what_was_waited_for_and_who_was_silent():
    waiter = Waiter(FenceFlag(), Epoch(4), 0.05)
    with pytest.raises(CommunicationFailed) as caught:
        waiter.until(never, "all-to-all 9", lambda: (RankId(2), RankId(5)))
    assert caught.value.silent == (2, 5)
    assert caught.value.waited_for == "all-to-all 9"
    assert str(caught.value) == (
        "all-to-all 9: not complete after 0.05 s in epoch 4; nothing from rank 2, 5"
    )


def test_a_ready_wait_costs_no_waiting():
    waiter = Waiter(FenceFlag(), Epoch(0), 1.0)
    waiter.until(lambda: True, "x", nobody)
    assert waiter.waited_s == 0.0
