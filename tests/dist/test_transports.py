"""The same demands on every transport, among real processes: exchange, leave, begin anew."""

import itertools
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transport_cluster import Cluster, payload, row_bytes_of

pytestmark = pytest.mark.timeout(60)

needs_gpu = pytest.mark.skipif(
    torch.cuda.device_count() < 4, reason="NCCL needs one GPU per rank, 4 in all"
)
all_transports = pytest.mark.parametrize(
    "backend", ["shm", "gloo", pytest.param("nccl", marks=needs_gpu)]
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(4) as running:
        yield running


@pytest.fixture(scope="module")
def epochs() -> Iterator[int]:
    return itertools.count(1)


def assert_uneven(cluster: Cluster, members: list[int], seeds: list[int], known: bool) -> None:
    results = cluster.call(members, "uneven", seeds, known)
    size = len(members)
    for turn, seed in enumerate(seeds):
        sent = [payload(seed, source, size, row_bytes_of(seed)) for source in range(size)]
        for index in range(size):
            for source in range(size):
                np.testing.assert_array_equal(results[index][turn][source], sent[source][index])


@all_transports
@pytest.mark.parametrize("members", [[2], [3, 1], [0, 2, 3], [0, 1, 2, 3]])
def test_uneven_all_to_all_equals_reference(cluster, epochs, backend, members):
    cluster.call(members, "enter", cluster.spec(backend), next(epochs), members)
    assert_uneven(cluster, members, list(range(40)), known=False)
    assert_uneven(cluster, members, list(range(40, 60)), known=True)


@all_transports
def test_ints_and_rows_interleave(cluster, epochs, backend):
    members = [0, 1, 2, 3]
    cluster.call(members, "enter", cluster.spec(backend), next(epochs), members)
    for turn in range(5):
        for rank in members:
            cluster.ask([rank], "gather", [rank, -turn, 2**62])
        expected = [[rank, -turn, 2**62] for rank in members]
        assert cluster.answers(members) == [("ok", expected)] * 4
        assert_uneven(cluster, members, [turn], known=False)


@all_transports
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_dispatch_and_combine_equal_a_dense_layer(cluster, epochs, backend, dtype, size):
    members = list(range(4 - size, 4))
    cluster.call(members, "enter", cluster.spec(backend), next(epochs), members)
    for layers in cluster.call(members, "layers", list(range(20)), dtype):
        assert all(layer["equal"] for layer in layers)
        assert all(layer["weight_on_sentinel"] == 0.0 for layer in layers)
        if size > 1:  # a domain of one keeps rows whose every choice is masked
            assert all(layer["rows_without_expert"] == 0 for layer in layers)


@all_transports
def test_waits_are_accounted(cluster, epochs, backend):
    members = [0, 1]
    cluster.call(members, "enter", cluster.spec(backend), next(epochs), members)
    cluster.call(members, "gather", [1])
    before = cluster.call([0], "waited_s")[0]
    cluster.ask([0], "gather", [2])
    time.sleep(0.3)
    cluster.ask([1], "gather", [2])
    cluster.answers(members)
    assert 0.25 < cluster.call([0], "waited_s")[0] - before < 5


@all_transports
def test_survivors_leave_after_a_kill(backend):
    members = [0, 1, 2, 3]
    with Cluster(4) as cluster:
        cluster.call(members, "enter", cluster.spec(backend), 1, members)
        cluster.ask(members, "exchange_for_ever")
        time.sleep(0.2)
        cluster.signal(1, signal.SIGKILL)
        time.sleep(0.2)
        cluster.fence([0, 2, 3], 2)
        kinds = {kind for kind, _ in cluster.answers([0, 2, 3], within_s=2.0)}
        assert kinds <= ({"left"} if backend == "shm" else {"left", "failed"})
        assert_new_domain(cluster, backend, 2, [0, 2, 3])
        assert_freed(cluster, [0, 2, 3])


def assert_freed(cluster: Cluster, members: list[int]) -> None:
    """What was left behind is gone long before its time-out of 30 s, and costs no core."""
    until = time.monotonic() + 5.0
    while any(cluster.call(members, "unfreed")):
        assert time.monotonic() < until, "groups of left epochs are still there"
        time.sleep(0.05)


def assert_new_domain(cluster: Cluster, backend: str, epoch: int, members: list[int]) -> None:
    assert max(cluster.call(members, "leave")) < 0.2
    assert max(cluster.call(members, "enter", cluster.spec(backend), epoch, members)) < 5.0
    assert_uneven(cluster, members, list(range(30)), known=False)


@all_transports
def test_abort_without_the_peers_death_and_a_zombie_afterwards(backend):
    members, survivors = [0, 1, 2, 3], [0, 2, 3]
    with Cluster(4) as cluster:
        cluster.call(members, "enter", cluster.spec(backend), 7, members)
        cluster.ask(members, "exchange_for_ever")
        time.sleep(0.2)
        cluster.signal(1, signal.SIGSTOP)
        time.sleep(0.3)
        assert not any(cluster.pipes[rank].poll() for rank in survivors)
        cluster.fence(survivors, 8)
        assert cluster.answers(survivors, within_s=0.5) == [("left", None)] * 3
        assert_new_domain(cluster, backend, 8, survivors)
        assert_freed(cluster, survivors)
        cluster.ask(survivors, "uneven", list(range(200)))
        cluster.signal(1, signal.SIGCONT)  # the zombie wakes into the middle of it
        assert {kind for kind, _ in cluster.answers(survivors)} == {"ok"}
        assert_uneven(cluster, survivors, list(range(30)), known=False)
        if backend == "shm":  # it sees by itself that its epoch is over
            assert cluster.answers([1], within_s=2.0) == [("left", None)]
        else:
            cluster.fence([1], 9)
            assert cluster.answers([1], within_s=2.0)[0][0] in ("left", "failed")
        assert_new_domain(cluster, backend, 10, survivors)


@all_transports
def test_a_time_out_names_the_silent_rank(backend):
    members = [0, 1, 2]
    with Cluster(3) as cluster:
        cluster.call(members, "enter", cluster.spec(backend, timeout_s=0.5), 1, members)
        cluster.call(members, "gather", [1])
        cluster.signal(1, signal.SIGSTOP)
        cluster.ask([0, 2], "gather", [1])
        for rank, (kind, (silent, message)) in zip([0, 2], cluster.answers([0, 2]), strict=True):
            assert kind == "failed"
            assert "ints" in message
            assert silent == ((1,) if backend == "shm" else tuple({0, 1, 2} - {rank}))


def test_a_zombie_spoils_no_region_of_a_replacement_with_its_rank_id():
    """Rank 1 still fills the outbox of its old epoch while another process bears its id."""
    with Cluster(3) as cluster:
        cluster.call([0, 1], "enter", cluster.spec("shm"), 1, [0, 1])
        cluster.call([0, 1], "gather", [1])
        cluster.ask([1], "linger_in_outbox", 0.4)
        cluster.ask([0], "linger_in_outbox", 0.0)
        time.sleep(0.1)
        cluster.fence([0], 2)
        assert cluster.answers([0]) == [("left", None)]
        cluster.call([2], "become", 1)
        cluster.ask([0, 2], "enter", cluster.spec("shm"), 2, [0, 1])
        assert {kind for kind, _ in cluster.answers([0, 2])} == {"ok"}
        cluster.ask([0, 2], "uneven_for", 0.6)
        assert cluster.answers([0, 2]) == [("ok", True)] * 2
        assert cluster.answers([1]) == [("left", None)]


@pytest.mark.parametrize("backend", ["gloo"])
def test_building_a_group_is_bounded_and_interruptible(backend):
    with Cluster(2) as cluster:
        cluster.ask([0], "enter", cluster.spec(backend, timeout_s=1.0), 1, [0, 1])
        ((kind, (silent, message)),) = cluster.answers([0], within_s=3.0)
        assert (kind, silent) == ("failed", (1,)), message
        cluster.ask([0], "enter", cluster.spec(backend), 2, [0, 1])
        time.sleep(0.3)
        cluster.fence([0], 3)
        assert cluster.answers([0], within_s=0.5) == [("left", None)]
        assert_new_domain(cluster, backend, 3, [0, 1])


def test_the_fence_holds_for_epochs_not_entered_yet():
    with Cluster(2) as cluster:
        cluster.fence([0], 5)
        time.sleep(0.1)
        cluster.ask([0], "enter", cluster.spec("shm"), 4, [0, 1])
        assert cluster.answers([0]) == [("left", None)]
        cluster.call([0, 1], "enter", cluster.spec("shm"), 5, [0, 1])
        cluster.call([0, 1], "gather", [1])
