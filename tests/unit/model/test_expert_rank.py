"""Ranks with experts only, ranks that become such, and steps cut into micro-batches."""

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.solo import EPOCH, ME, SoloRank
from support.warm import Zygote
from unit.memberships import membership

from revivemoe.checkpoint import ARCHS
from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.transport import SoloTransport
from revivemoe.comm.wait import Waiter
from revivemoe.core.limits import RankLimits
from revivemoe.core.step import Batch, StepResult
from revivemoe.ids import ExpertId, LayerId, SlotId
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.messages.commands import SlotLoad
from revivemoe.model import tensor_files
from revivemoe.model.finite import NonFiniteStep
from revivemoe.model.load import load_model
from revivemoe.model.runner import NOT_SHARED, DenseSpec, ModelRunner, register_hooks
from revivemoe.sampling_params import SamplingParams

register_hooks()
CPU = torch.device("cpu")
EXPERT_VALUES = 3 * 64 * 32
"""Of one expert of a tiny model: gate, up and down."""
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip
PROMPTS = [[7, 8, 9, 10, 11], list(range(20, 50)), [99], [4, 5, 6] * 5]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and threads that wait for each other suffer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runner(
    path: Path,
    held: tuple[int, ...],
    attention: bool,
    dtype: torch.dtype = torch.float32,
    dense: DenseSpec = NOT_SHARED,
) -> ModelRunner:
    info = inspect_checkpoint(path)
    slots = dict.fromkeys(map(LayerId, info.moe_layers), held)
    return ModelRunner(path, slots, info.num_experts, info.top_k, dtype, CPU, attention, dense)


def whole(path: Path, dtype: torch.dtype = torch.float32) -> dict[LayerId, Any]:
    """Experts modules as `load_model` fills them, all experts."""
    layers = map(LayerId, inspect_checkpoint(path).moe_layers)
    return load_model(path, dict.fromkeys(layers, tuple(range(16))), dtype, CPU).experts


def check_slots(rank: ModelRunner, theirs: dict[LayerId, Any]) -> None:
    """Each slot holds what it says."""
    assert rank.exchange.layers.keys() == theirs.keys()
    for layer in theirs:
        for slot, expert in enumerate(rank.worker.slots.row(layer)):
            if expert < 0:
                continue
            rows = rank.exchange.layers[layer].read_slot(SlotId(slot))
            assert rows.keys() == dict(theirs[layer].named_parameters(recurse=False)).keys()
            for name, row in rows.items():
                expected = getattr(theirs[layer], name)[expert]
                assert row.dtype == expected.dtype
                assert torch.equal(row, expected), (layer, slot, name)


# ---- experts only ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_an_expert_rank_takes_what_its_slots_take(
    made: dict[str, Path], arch: str, dtype: torch.dtype
) -> None:
    rank = runner(made[arch], (3, 0, -1, 15, 7), attention=False, dtype=dtype)
    num_layers = len(inspect_checkpoint(made[arch]).moe_layers)
    assert rank.generator is None
    assert rank.num_bytes() == num_layers * 5 * EXPERT_VALUES * dtype.itemsize
    assert set(rank.worker.slots.table) == {(3, 0, -1, 15, 7)}
    check_slots(rank, whole(made[arch], dtype))


def test_an_attention_rank_with_slots_takes_so_much_more(made: dict[str, Path]) -> None:
    without, with_slots = (runner(made["qwen3_moe"], held, True) for held in ((), (1, 2, 3)))
    assert with_slots.num_bytes() - without.num_bytes() == 4 * 3 * EXPERT_VALUES * 4


def test_an_expert_rank_has_no_pages_and_no_tokens(made: dict[str, Path]) -> None:
    rank = runner(made["qwen3_moe"], (1, 2), attention=False)
    before = rank.num_bytes()
    rank.allocate(60, 8)
    assert rank.num_bytes() == before
    assert rank.kv_bytes_per_block(8) == 0
    assert rank.maskable, "it has no router that could not be"
    with pytest.raises(AssertionError, match="no tokens of its own"):
        rank.execute(Batch(0, ()))
    rank.become_expert_rank(3)
    assert rank.worker.slots.table == ((-1,) * 3,) * 4, "it is one: only the slots are laid out"


def test_an_expert_rank_reads_its_experts_and_nothing_else(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            part: torch.Tensor = self.inner[index]
            read.append((self.name, part.nbytes))
            return part

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.handle = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def keys(self) -> list[str]:
            return list(self.handle.keys())

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.handle.get_slice(name))

    monkeypatch.setattr(tensor_files, "safe_open", Opened)
    rank = runner(made["deepseek_v3"], (9, 4), attention=False)
    assert {name.split(".experts.")[1].split(".")[0] for name, _ in read} == {"9", "4"}
    assert sum(size for _, size in read) == rank.num_bytes()


def test_an_expert_rank_serves_a_step(made: dict[str, Path]) -> None:
    """Without tokens of its own, in a domain of one, for any number of micro-batches."""
    rank = runner(made["olmoe"], tuple(range(16)), attention=False)
    phases: list[tuple[str, int, int]] = []
    rank.exchange.on_phase = lambda *phase: phases.append(phase)
    enter(rank, 2)
    rank.serve()
    reached = [(name, layer) for name, layer, _ in phases]
    assert [layer for name, layer in reached if name == "experts"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert reached[-1] == ("sample", -1)
    assert {num_rows for *_, num_rows in phases} == {0}


# ---- from one role to the other -------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_rank_that_becomes_an_expert_rank_keeps_nothing_else(
    made: dict[str, Path], arch: str
) -> None:
    rank = runner(made[arch], (), attention=True)
    weights = rank.num_bytes()
    rank.allocate(60, 8)
    assert rank.num_bytes() == weights + 60 * rank.kv_bytes_per_block(8)
    assert rank.worker.slots.table == ()
    assert rank.generator is not None
    model, pages = rank.generator.model, rank.generator._cache.pages
    kept = [weakref.ref(x) for x in (model, model.lm_head.weight, pages[0][0])]
    kept += [weakref.ref(p) for p in model.parameters() if p.numel()]
    del model, pages
    rank.become_expert_rank(5)
    gc.collect()
    assert not [ref() for ref in kept if ref() is not None], "weights and pages are freed"
    num_layers = len(inspect_checkpoint(made[arch]).moe_layers)
    assert rank.generator is None
    assert rank.kv_bytes_per_block(8) == 0
    assert rank.num_bytes() == num_layers * 5 * EXPERT_VALUES * 4
    assert rank.worker.slots.table == ((-1,) * 5,) * num_layers


RELEASED = """
import sys
from pathlib import Path

import psutil
import torch

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.ids import LayerId
from revivemoe.model.runner import ModelRunner

path = Path(sys.argv[1])
info = inspect_checkpoint(path)
slots = dict.fromkeys(map(LayerId, info.moe_layers), ())
cpu = torch.device("cpu")
rank = ModelRunner(path, slots, info.num_experts, info.top_k, torch.float32, cpu)
rank.allocate(4000, 16)
for pair in rank.generator._cache.pages:
    for pages in pair:
        pages.fill_(1.0)
del pair, pages
before = psutil.Process().memory_info().rss
pages_bytes = 4000 * rank.kv_bytes_per_block(16)
rank.become_expert_rank(8)
print((before - psutil.Process().memory_info().rss) / pages_bytes)
"""


def test_the_memory_of_its_pages_goes_back_to_the_system(
    made: dict[str, Path], warm: Zygote
) -> None:
    """Not only to the allocator: as the kernel sees it, in a process of its own."""
    assert float(warm.run(RELEASED, str(made["qwen3_moe"])).split()[-1]) > 0.9


@pytest.mark.parametrize("arch", ARCHS)
def test_experts_loaded_afterwards_are_those_of_a_load(made: dict[str, Path], arch: str) -> None:
    rank = runner(made[arch], (), attention=True)
    rank.allocate(60, 8)
    rank.become_expert_rank(4)
    layers = tuple(rank.exchange.layers)
    given = tuple((6, 13, -1, i) for i in range(len(layers)))
    loads = rank.worker.slots.lacking(given)
    assert set(loads) == {
        SlotLoad(layer, SlotId(slot), ExpertId(expert))
        for i, layer in enumerate(layers)
        for slot, expert in ((0, 6), (1, 13), (3, i))
    }
    report = rank.worker.load(loads)
    assert report.num_bytes == len(loads) * EXPERT_VALUES * 4
    assert rank.worker.slots.table == given
    check_slots(rank, whole(made[arch]))


@pytest.mark.parametrize("arch", ARCHS)
def test_its_experts_compute_what_they_do_elsewhere(made: dict[str, Path], arch: str) -> None:
    held = (2, 11, 5)
    switched, born = (runner(made[arch], given, a) for given, a in (((), True), (held, False)))
    switched.become_expert_rank(3)
    layers = tuple(switched.exchange.layers)
    switched.worker.load(switched.worker.slots.lacking((held,) * len(layers)))
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([[0, 1], [1, 3], [3, 3], [2, 0], [2, 3], [0, 3], [1, 2]])
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)).masked_fill(
        slots == 3, 0
    )
    for layer in layers:
        ours, theirs = (r.exchange.layers[layer].compute(rows, slots, weights)
                        for r in (switched, born))  # fmt: skip
        assert torch.equal(ours, theirs)
        assert ours[0].any()
        assert not ours[2].any()


def test_shards_of_dense_layers_go_with_the_attention_role(made: dict[str, Path]) -> None:
    dense = DenseSpec((LayerId(0),), 2, (1,))
    plain = runner(made["deepseek_v3"], (), attention=True)
    rank = runner(made["deepseek_v3"], (), attention=True, dense=dense)
    assert plain.num_bytes() - rank.num_bytes() == 3 * 64 * 128 // 2 * 4, "half of one layer"
    assert rank.load_shards((0, 1)) == 1
    assert plain.num_bytes() == rank.num_bytes()
    rank.become_expert_rank(2)
    assert rank.exchange.dense[LayerId(0)].shards == {}
    assert rank.num_bytes() == 3 * 2 * EXPERT_VALUES * 4
    never = runner(made["deepseek_v3"], (1,), attention=False, dense=dense)
    assert never.exchange.dense[LayerId(0)].shards == {}, "an expert rank holds none"


# ---- micro-batches --------------------------------------------------------------------------


def enter(rank: ModelRunner, microbatches: int) -> None:
    """Take up an epoch of one rank, with a domain for each micro-batch."""
    layers = tuple(rank.exchange.layers)
    placement = ExpertPlacement(16, layers, {ME: rank.worker.slots.table})
    transports = [
        SoloTransport(Waiter(FenceFlag(), EPOCH, 10.0), EPOCH, (ME,), ME, CPU)
        for _ in range(microbatches)
    ]
    dispatchers = [Dispatcher(t, placement.slots_per_rank) for t in transports]
    rank.enter(dispatchers, membership(placement), ME)


def solo(path: Path, microbatches: int, masked: dict[int, set[int]] | None = None) -> SoloRank:
    rank = SoloRank(path, LIMITS, masked)
    enter(rank.runner, microbatches)
    return rank


def params(temperature: float) -> SamplingParams:
    return SamplingParams(
        seed=3, temperature=temperature, max_tokens=10, logprobs=3, prompt_logprobs=1
    )


def watch_turns(rank: SoloRank, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The micro-batch of each turn."""
    turns: list[int] = []
    exchange = rank.runner.exchange
    original = exchange.turn_to

    def turn_to(microbatch: int) -> None:
        turns.append(microbatch)
        original(microbatch)

    monkeypatch.setattr(exchange, "turn_to", turn_to)
    return turns


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_any_number_of_microbatches_gives_the_same_tokens(
    made: dict[str, Path], arch: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solo(made[arch], 1).run(PROMPTS, params(temperature), steps_apart=2)
    assert all(expected)
    for count in (2, 3):
        rank = solo(made[arch], count)
        turns = watch_turns(rank, monkeypatch)
        assert rank.run(PROMPTS, params(temperature), steps_apart=2) == expected
        assert set(turns) == set(range(count))


def test_masked_experts_are_masked_in_every_microbatch(made: dict[str, Path]) -> None:
    masked = {layer: {1, 4, 9} for layer in range(4)}
    expected = solo(made["qwen3_moe"], 1, masked).run(PROMPTS, params(0.0))
    assert expected != solo(made["qwen3_moe"], 1).run(PROMPTS, params(0.0)), "it matters"
    assert solo(made["qwen3_moe"], 3, masked).run(PROMPTS, params(0.0)) == expected


def test_one_sequence_leaves_the_other_microbatches_empty(made: dict[str, Path]) -> None:
    expected = solo(made["mixtral"], 1).run(PROMPTS[:1], params(0.0))
    rank = solo(made["mixtral"], 3)
    reached: list[tuple[int, int]] = []
    exchange = rank.runner.exchange

    def note(phase: str, layer: int, _: int) -> None:
        if phase == "experts":
            reached.append((layer, exchange.lanes.index(exchange._lane)))

    exchange.on_phase = note
    assert rank.run(PROMPTS[:1], params(0.0)) == expected
    assert reached[:12] == [(layer, lane) for layer in range(4) for lane in range(3)]
    assert reached[12:24] == reached[:12], "each step once through all of them"


def test_microbatches_go_layer_by_layer(made: dict[str, Path]) -> None:
    """While one waits for its experts, the next sends: sent, sent, computed, computed, ..."""
    rank = solo(made["qwen3_moe"], 2)
    reached: list[tuple[str, int, int]] = []

    def note(phase: str, layer: int, _: int) -> None:
        lane = rank.runner.exchange.lanes.index(rank.runner.exchange._lane)
        reached.append((phase, layer, lane))

    rank.runner.exchange.on_phase = note
    rank.run(PROMPTS[:2], SamplingParams(seed=0, temperature=0.0, max_tokens=1))
    step = reached[: reached.index(("sample", -1, 1))]
    half = [(p, k, n) for p, k, n in step if p in ("dispatch", "experts")]
    first = [("dispatch", 0, 0), ("dispatch", 0, 1)]
    between = [
        (phase, layer + later, lane)
        for layer in range(3)
        for lane in (0, 1)
        for phase, later in (("experts", 0), ("dispatch", 1))
    ]
    assert half == [*first, *between, ("experts", 3, 0), ("experts", 3, 1)]


def test_tokens_are_on_their_way_when_the_turn_is_given_up(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, done = solo(made["qwen3_moe"], 2), list[tuple[str, int]]()
    for number, lane in enumerate(rank.runner.exchange.lanes):
        for name in ("send", "receive"):
            original = getattr(lane.dispatcher, name)

            def call(*args: Any, what: tuple[str, int] = (name, number), do: Any = original) -> Any:
                done.append(what)
                return do(*args)

            monkeypatch.setattr(lane.dispatcher, name, call)
    rank.run(PROMPTS[:2], SamplingParams(seed=0, temperature=0.0, max_tokens=1))
    one_layer = [("receive", 0), ("send", 0), ("receive", 1), ("send", 1)]
    assert done[:14] == [("send", 0), ("send", 1), *one_layer * 3]


class Broken(Exception):
    """What a step raises."""


@pytest.mark.parametrize("lane", [0, 1, 2])
@pytest.mark.parametrize("phase", ["attention", "experts"])
def test_a_step_that_failed_in_one_microbatch_can_be_taken_again(
    made: dict[str, Path], lane: int, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solo(made["qwen3_moe"], 1).run(PROMPTS, params(0.0))
    rank = solo(made["qwen3_moe"], 3)
    exchange, execute = rank.runner.exchange, rank.runner.execute
    to_fail, step = {0, 3, 7}, [-1]

    def fail(at: str, layer: int, _: int) -> None:
        here = (at, layer) == (phase, 2) and exchange._lane is exchange.lanes[lane]
        if here and step[0] in to_fail:
            to_fail.remove(step[0])
            raise Broken

    def twice(batch: Batch) -> list[StepResult]:
        step[0] += 1
        if step[0] in to_fail:
            with pytest.raises(Broken):
                execute(batch)
        return execute(batch)

    exchange.on_phase = fail
    monkeypatch.setattr(rank.runner, "execute", twice)
    assert rank.run(PROMPTS, params(0.0)) == expected
    assert not to_fail


@pytest.mark.parametrize("lane", [0, 1])
def test_broken_numbers_of_any_microbatch_are_seen(made: dict[str, Path], lane: int) -> None:
    rank = solo(made["qwen3_moe"], 2)
    exchange = rank.runner.exchange

    def spoil(stage: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        hit = (stage, layer) == ("experts", 1) and exchange._lane is exchange.lanes[lane]
        return torch.full_like(values, torch.nan) if hit else values

    exchange.spoil = spoil
    with pytest.raises(NonFiniteStep):
        rank.run(PROMPTS[:2], params(0.0))
    assert rank.runner.exchange.non_finite() == (1, "experts", True)
    exchange.reset()
    assert rank.runner.exchange.non_finite() is None


def test_steps_undone_and_taken_again(made: dict[str, Path]) -> None:
    expected = solo(made["qwen3_moe"], 1).run(PROMPTS, params(1.0))
    rank = solo(made["qwen3_moe"], 2)
    assert rank.run_interrupted(PROMPTS, params(1.0), random.Random(1)) == expected
