"""Dispatch in a domain of one, its sizes, and the order of rows and sums, in one process."""

import os
import threading

import pytest
import torch

from revivemoe.comm import dispatch
from revivemoe.comm.dispatch import Dispatched, Dispatcher, region_bytes
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import DomainLeft, FenceFlag
from revivemoe.comm.rows import TorchRows
from revivemoe.comm.shm import create_segment
from revivemoe.ids import Epoch, RankId
from revivemoe.kernels.library import NoKernels
from revivemoe.kernels.rows import NativeRows
from revivemoe.messages.commands import DomainSpec

SLOTS = 2


@pytest.fixture(autouse=True, params=[TorchRows, NativeRows])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here with torch's operators, and with our own."""
    try:
        chosen = request.param()
    except NoKernels as error:
        pytest.skip(str(error))
    monkeypatch.setattr(dispatch, "TorchRows", lambda: chosen)


def in_domain(num: int, tokens: int, hidden: int, top_k: int, act) -> list:
    """Run `act(rank, dispatcher)` on `num` members, one thread each; their results."""
    fd = create_segment(num, region_bytes(num, tokens, hidden, 2, top_k))
    members, results = tuple(RankId(r) for r in range(num)), [None] * num

    def member(rank: int) -> None:
        with Domains(FenceFlag(), fd) as domains, torch.inference_mode():
            (transport,) = domains.enter(
                DomainSpec(backend="shm", timeout_s=10), Epoch(0), members, RankId(rank)
            )
            results[rank] = act(rank, Dispatcher(transport, SLOTS))

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return results


def test_a_token_travels_once_to_each_rank_with_all_its_choices():
    slots = [[[0, 3, 1], [3, -1, 2]], [[-1, -1, -1], [1, 2, -1]]]

    def act(rank: int, dispatcher: Dispatcher) -> Dispatched:
        hidden = torch.tensor([[rank * 10.0], [rank * 10.0 + 1]])
        weights = torch.tensor([[0.5, 0.25, 0.125]] * 2)
        return dispatcher.dispatch(hidden, torch.tensor(slots[rank]), weights)

    first, second = in_domain(2, 2, 1, 3, act)
    assert first.rows_RH.tolist() == [[0.0], [11.0]]
    assert first.slot_ids_RK.tolist() == [[0, 2, 1], [1, 2, 2]]
    assert first.weights_RK.tolist() == [[0.5, 0, 0.125], [0.5, 0, 0]]
    assert second.rows_RH.tolist() == [[0.0], [1.0], [11.0]]
    assert second.slot_ids_RK.tolist() == [[2, 1, 2], [1, 2, 0], [2, 0, 2]]
    assert second.weights_RK.tolist() == [[0, 0.25, 0], [0.5, 0, 0.125], [0, 0.25, 0]]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_in_the_order_of_ranks(out_dtype):
    """1e8 - 1e8 + 1 is 1 in that order alone, and bfloat16 sums would lose the 2^-6."""
    parts = [[1e8, 1.0], [-1e8, 2**-6], [1.0, -1.0]]

    def act(rank: int, dispatcher: Dispatcher) -> torch.Tensor:
        tokens = 1 if rank == 0 else 0  # the other two only serve experts
        slots = torch.tensor([[4, 0, 2]])[:tokens]
        hidden = torch.ones(tokens, 2, dtype=torch.bfloat16)
        got = dispatcher.dispatch(hidden, slots, torch.ones(tokens, 3))
        return dispatcher.combine(torch.tensor([parts[rank]], dtype=out_dtype), got.handle)

    outputs = in_domain(3, 1, 2, 3, act)
    assert outputs[0].tolist() == [[1.0, 2**-6]]
    assert outputs[0].dtype == torch.bfloat16
    assert [tuple(out.shape) for out in outputs] == [(1, 2), (0, 2), (0, 2)]


def test_the_worst_case_fills_the_region_and_no_more():
    """All tokens to all ranks; sums come back in float32, twice the size of the hidden states."""
    tokens, hidden, num = 33, 201, 3
    slots = torch.tensor([[0, 2, 4, 5]] * tokens)

    def act(rank: int, dispatcher: Dispatcher) -> bool:
        hidden_TH = torch.full((tokens, hidden), 2.0**rank, dtype=torch.bfloat16)
        got = dispatcher.dispatch(hidden_TH, slots, torch.ones(tokens, 4))
        out = dispatcher.combine(got.rows_RH.float(), got.handle)
        return torch.equal(out, hidden_TH * num) and len(got.rows_RH) == num * tokens

    assert all(in_domain(num, tokens, hidden, 4, act))


def test_all_tokens_masked_yield_zeros():
    def act(rank: int, dispatcher: Dispatcher) -> torch.Tensor:
        none = torch.full((3, 2), -1)
        got = dispatcher.dispatch(torch.ones(3, 4), none, torch.ones(3, 2))
        assert got.rows_RH.shape == (0, 4)
        return dispatcher.combine(got.rows_RH, got.handle)

    assert all(torch.equal(out, torch.zeros(3, 4)) for out in in_domain(2, 3, 4, 2, act))


def test_a_domain_of_one_copies_nothing_and_heeds_the_fence():
    fence, me = FenceFlag(), RankId(5)
    with Domains(fence) as domains:
        spec = DomainSpec(backend="shm")
        dispatcher = Dispatcher(domains.enter(spec, Epoch(2), (me,), me)[0], SLOTS)
        hidden = torch.randn(2, 4)
        got = dispatcher.dispatch(hidden, torch.tensor([[1, -1], [-1, -1]]), torch.ones(2, 2))
        assert got.rows_RH.data_ptr() == hidden.data_ptr()
        assert got.slot_ids_RK.tolist() == [[1, SLOTS], [SLOTS, SLOTS]]
        assert got.weights_RK.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert torch.equal(dispatcher.combine(got.rows_RH, got.handle), hidden)
        fence.raise_to(Epoch(3))
        with pytest.raises(DomainLeft):
            domains.current[0].all_gather_ints([1])
        with pytest.raises(DomainLeft):
            dispatcher.dispatch(hidden, torch.tensor([[1], [0]]), torch.ones(2, 1))


def test_a_domain_that_cannot_be_entered_is_refused():
    members = (RankId(0), RankId(1))
    with Domains(FenceFlag()) as domains:
        with pytest.raises(ValueError, match="descriptor of a segment"):
            domains.enter(DomainSpec(backend="shm"), Epoch(0), members, RankId(0))
        with pytest.raises(ValueError, match="store_address"):
            domains.enter(DomainSpec(backend="gloo"), Epoch(1), members, RankId(0))
        with pytest.raises(ValueError, match="use shm, gloo or nccl"):
            domains.enter(DomainSpec(backend="smoke"), Epoch(2), members, RankId(0))
