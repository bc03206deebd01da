"""What a recovery works out grows with the size of the expert map, and no faster.

Operations are counted, not timed: every bytecode instruction of Python code. Rank ids count too:
comparing or hashing one is Python code here, so that `rank in some_tuple` costs what it does.
Experts grow with the ranks, as in a deployment that is scaled out, so the map is four times as
large with four times as many ranks.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from revivemoe.checkpoint import make_model
from revivemoe.core.slots import ExpertSlots
from revivemoe.ids import Epoch, LayerId, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, place
from revivemoe.membership.topology import Topology
from revivemoe.messages.reports import Pace
from revivemoe.model.expert_worker import ExpertWorker
from revivemoe.model.experts import MoeLayer, choose_slots
from revivemoe.model.runner import register_hooks
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.planner import plan_recovery
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.slowness import MIN_CALLS, Slowness
from revivemoe.recovery.world import SequenceView, World

FEW, TIMES = 32, 4
ENOUGH = 4.5
"""So much more for four times as many ranks: linear with a logarithm, and no room for a
square, which would be sixteen times."""
LAYERS = (LayerId(3), LayerId(4))
PER_RANK = 4
"""Experts of a layer on a rank."""


class Rank(int):
    """A rank id whose comparisons are counted."""

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    def __hash__(self) -> int:
        return int(self)

    def __lt__(self, other: int) -> bool:
        return int(self) < other


def operations(work: Callable[[], object]) -> int:
    """Bytecode instructions that `work` takes, in whatever Python code it comes to."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def check_growth(of: Callable[[int], Callable[[], object]]) -> None:
    """`of(n)`: the work for n ranks, its input built anew."""
    few, many = operations(of(FEW)), operations(of(FEW * TIMES))
    assert few > 100, "it is the work that is counted"
    assert many / few <= ENOUGH, f"{few} operations for {FEW} ranks, {many} for {FEW * TIMES}"


# ---- instances of any size ------------------------------------------------------------------


def collocated(
    num_ranks: int, redundant: int = 0, spare: int = 0, kind: type[int] = Rank
) -> Membership:
    ranks = tuple(RankId(kind(r)) for r in range(num_ranks))
    placement = place(PER_RANK * num_ranks, LAYERS, ranks, redundant, spare)
    return Membership(Topology(Epoch(1), ranks, ranks, ranks), placement)


def apart(num_ranks: int) -> Membership:
    """Half of the ranks hold the experts, and there is no room."""
    ranks = tuple(RankId(Rank(r)) for r in range(num_ranks))
    attention, experts = ranks[: num_ranks // 2], ranks[num_ranks // 2 :]
    placement = place(PER_RANK * len(experts), LAYERS, experts)
    return Membership(Topology(Epoch(1), ranks, attention, experts), placement)


def world(present: Membership) -> World:
    """Four sequences on each rank."""
    owners = [rank for rank in present.attention for _ in range(4)]
    sequences = tuple(SequenceView(SeqId(i), owner, 10, i) for i, owner in enumerate(owners))
    return World(present, sequences, True, 0, home=present.topology)


def recovery(present: Membership, check: Callable[[Continue], object]) -> Callable[[], object]:
    """The plan for the loss of the last rank: one that went the way that is meant."""
    asked, dead = world(present), Fault(present.members[-1], "process_exit", "gone")
    # By another rank's map, so that nothing of this one is known beforehand.
    plan = plan_recovery(world(present.at(Epoch(9))), [dead], Policy())
    assert isinstance(plan, Continue)
    assert check(plan), plan.reason
    fresh = msgspec.structs.replace(present.placement, slots=dict(present.placement.slots))
    cold = Membership(present.topology, fresh)
    asked = world(cold)
    return lambda: plan_recovery(asked, [dead], Policy())


# ---- the plan -------------------------------------------------------------------------------


def test_a_loss_that_replicas_cover() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        twice = collocated(num_ranks, redundant=PER_RANK * num_ranks)
        return recovery(twice, lambda plan: plan.experts_dropped and not plan.reloads)

    check_growth(of)


def test_a_loss_whose_experts_are_loaded_elsewhere() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        roomy = collocated(num_ranks, spare=1)
        return recovery(roomy, lambda plan: len(plan.reloads) == PER_RANK * len(LAYERS))

    check_growth(of)


def test_a_loss_for_which_a_rank_switches_its_role() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        return recovery(apart(num_ranks), lambda plan: len(plan.switches) == 1)

    check_growth(of)


def test_all_ranks_come_back_at_once() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        present = collocated(num_ranks)
        back, tables = present.members, present.placement.slots
        asked = replace(world(present), gone=back, ready=back, tables=tables)
        return lambda: plan_recovery(asked, [], Policy())

    check_growth(of)


# ---- what each rank works out ---------------------------------------------------------------


def test_the_slots_to_send_to() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        present = collocated(num_ranks, redundant=PER_RANK * num_ranks)
        return lambda: choose_slots(present, present.members[1])

    check_growth(of)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> ExpertWorker:
    """One rank's slots, all empty. Its checkpoint is any one: nothing is read from it."""
    register_hooks()
    path = tmp_path_factory.mktemp("model")
    make_model(path, "qwen3_moe", "tiny", seed=0)
    layers = [MoeLayer(layer, nn.Module(), 0, 1) for layer in LAYERS]
    slots = ExpertSlots(dict.fromkeys(LAYERS, [EMPTY] * (2 * PER_RANK)))
    return ExpertWorker(layers, slots, 8, path, torch.float32)


def test_a_configuration_from_the_wire_to_what_is_loaded(worker: ExpertWorker) -> None:
    """As a rank takes it: decoded, checked, named, compared with what it holds."""

    def of(num_ranks: int) -> Callable[[], object]:
        twice = collocated(num_ranks, redundant=PER_RANK * num_ranks, kind=int)
        sent = msgspec.msgpack.encode(twice)

        def take() -> None:
            present = msgspec.msgpack.decode(sent, type=Membership)
            loads = worker.slots.lacking(present.table_of(RankId(1)))
            assert len(loads) == 2 * PER_RANK * len(LAYERS)
            assert present.mask_key == b""
            assert present.shards_of(RankId(1)) == frozenset()

        return take

    check_growth(of)


def test_what_a_rank_loads_does_not_grow_at_all(worker: ExpertWorker) -> None:
    def of(num_ranks: int) -> int:
        present = collocated(num_ranks, redundant=PER_RANK * num_ranks)
        table = present.table_of(RankId(1))
        return operations(lambda: worker.slots.lacking(table))

    assert of(FEW) == of(FEW * TIMES)


# ---- slowness -------------------------------------------------------------------------------


def test_the_comparison_of_paces() -> None:
    def of(num_ranks: int) -> Callable[[], object]:
        slow = Slowness(Policy())
        for rank in range(num_ranks):
            paces = [Pace(p, 3, 0.01 + rank / 1e4, MIN_CALLS) for p in ("attention", "experts")]
            slow.heard(RankId(Rank(rank)), paces)
        return slow.ratios

    check_growth(of)


def test_the_count_sees_a_square() -> None:
    """Both kinds: a loop in a loop, and a search in a tuple for each of its members."""

    def loops(num_ranks: int) -> Callable[[], object]:
        return lambda: [a + b for a in range(num_ranks) for b in range(num_ranks)]

    def searches(num_ranks: int) -> Callable[[], object]:
        ranks = tuple(Rank(r) for r in range(num_ranks))
        return lambda: [Rank(r) in ranks for r in range(num_ranks)]

    for square in (loops, searches):
        with pytest.raises(AssertionError, match="operations for"):
            check_growth(square)
