"""Dense layers in shards: what is cut, read, summed and sent where."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.solo import EPOCH, ME, SoloRank
from torch import nn
from transformers import AutoModelForCausalLM
from unit.memberships import membership, without_experts

from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.transport import SoloTransport
from revivemoe.comm.wait import Waiter
from revivemoe.core.limits import RankLimits
from revivemoe.ids import Epoch, LayerId, RankId
from revivemoe.membership.dense_groups import DenseGroups, form_groups
from revivemoe.membership.placement import ExpertPlacement
from revivemoe.membership.topology import collocated, disaggregated
from revivemoe.model import tensor_files
from revivemoe.model.dense import (
    PROJECTIONS,
    DenseLayer,
    DenseReader,
    ShardedMlp,
    dense_servers,
    replace_dense,
)
from revivemoe.model.load import CheckpointError
from revivemoe.model.runner import DenseSpec, ModelRunner, register_hooks
from revivemoe.sampling_params import SamplingParams

register_hooks()
CPU = torch.device("cpu")
ARCHS = ["deepseek_v3", "glm4_moe"]
"""With a dense layer, the first."""
HIDDEN, WIDTH = 64, 128
FIRST = LayerId(0)
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and threads that wait for each other suffer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mlps(made: dict[str, Path]) -> dict[str, Any]:
    """`transformers`' dense module of each architecture."""
    return {
        arch: AutoModelForCausalLM.from_pretrained(made[arch]).model.layers[0].mlp for arch in ARCHS
    }


def tokens(count: int = 9) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2))


def a_layer(
    path: Path, num_shards: int, shards: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> DenseLayer:
    layer = DenseLayer(FIRST, num_shards, CPU)
    layer.act = nn.SiLU()
    assert DenseReader(path, num_shards, dtype, CPU).load([layer], shards) == len(shards)
    return layer


def asks_all(num_tokens: int, num_shards: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and weights of rows that want every shard here."""
    slots = torch.arange(num_shards).repeat(num_tokens, 1)
    return slots, torch.ones(num_tokens, num_shards)


# ---- sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_the_sum_over_shards_is_the_whole_layer(
    made: dict[str, Path], mlps: dict[str, Any], arch: str, num_shards: int
) -> None:
    layers = [a_layer(made[arch], num_shards, (shard,)) for shard in range(num_shards)]
    rows, asked = tokens(), asks_all(9, num_shards)
    parts = [layer.compute(rows, *asked) for layer in layers]
    expected = mlps[arch](rows)
    assert expected.abs().max() > 0.01
    assert torch.allclose(sum(parts), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert all(part.dtype == torch.float32 and part.abs().max() > 0 for part in parts)


@pytest.mark.parametrize("num_shards", [2, 4])
@torch.no_grad()
def test_a_rank_with_several_shards_adds_them_up(
    made: dict[str, Path], mlps: dict[str, Any], num_shards: int
) -> None:
    layer = a_layer(made["deepseek_v3"], num_shards, tuple(range(num_shards)))
    got = layer.compute(tokens(), *asks_all(9, num_shards))
    torch.testing.assert_close(got, mlps["deepseek_v3"](tokens()), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_get_the_shards_they_ask_for(made: dict[str, Path]) -> None:
    """2 is the sentinel for "not here"; a row that asks for nothing gets zeros."""
    both = a_layer(made["deepseek_v3"], 2, (0, 1))
    rows, weights = tokens(4), torch.ones(4, 2)
    one, other = (a_layer(made["deepseek_v3"], 2, (s,)).compute(rows, *asks_all(4, 2))
                  for s in (0, 1))  # fmt: skip
    got = both.compute(rows, torch.tensor([[0, 2], [2, 1], [0, 1], [2, 2]]), weights)
    torch.testing.assert_close(got[0], one[0])
    torch.testing.assert_close(got[1], other[1])
    torch.testing.assert_close(got[2], one[2] + other[2])
    assert not got[3].any()
    assert not both.compute(rows[:0], torch.zeros(0, 2, dtype=torch.int64), weights[:0]).numel()


def test_without_the_attention_role_nothing_is_computed(made: dict[str, Path]) -> None:
    layer = a_layer(made["deepseek_v3"], 2, (0,))
    layer.act = None
    with pytest.raises(AssertionError, match="computes no dense layer"):
        layer.compute(tokens(), *asks_all(9, 2))


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_are_cut_from_the_checkpoint(
    made: dict[str, Path], mlps: dict[str, Any], num_shards: int, dtype: torch.dtype
) -> None:
    layer = a_layer(made["deepseek_v3"], num_shards, tuple(range(num_shards)), dtype)
    mlp, share = mlps["deepseek_v3"], WIDTH // num_shards
    for shard, weights in layer.shards.items():
        assert weights.keys() == set(PROJECTIONS)
        span = slice(shard * share, (shard + 1) * share)
        for name, weight in weights.items():
            full = getattr(mlp, name).weight.data
            expected = full[:, span] if name == "down_proj" else full[span]
            assert (weight.dtype, weight.is_contiguous()) == (dtype, True)
            assert torch.equal(weight, expected.to(dtype))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(tensor, bytes) of every read."""
    read: list[tuple[str, int]] = []

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            part: torch.Tensor = self.inner[index]
            read.append((self.name, part.nbytes))
            return part

        def get_shape(self) -> list[int]:
            return list(self.inner.get_shape())

    class Opened:
        """Has nothing that reads but slices."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.handle = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.handle.get_slice(name))

    monkeypatch.setattr(tensor_files, "safe_open", Opened)
    return read


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_only_its_own_part_is_read(
    made: dict[str, Path], reads: list[tuple[str, int]], num_shards: int
) -> None:
    layer = a_layer(made["glm4_moe"], num_shards, (num_shards - 1,))
    part = HIDDEN * WIDTH // num_shards * 4
    assert reads == [(f"model.layers.0.mlp.{name}.weight", part) for name in PROJECTIONS]
    assert layer.shards.keys() == {num_shards - 1}


def test_what_is_held_is_not_read_again(
    made: dict[str, Path], reads: list[tuple[str, int]]
) -> None:
    layer = a_layer(made["deepseek_v3"], 4, (2,))
    reader, held = DenseReader(made["deepseek_v3"], 4, torch.float32, CPU), layer.shards[2]
    reads.clear()
    assert reader.load([layer], (2,)) == 0
    assert reads == []
    assert reader.load([layer], {3, 2, 0}) == 2
    assert len(reads) == 2 * 3
    assert layer.shards[2] is held
    assert layer.shards.keys() == {0, 2, 3}


def test_a_checkpoint_without_the_layer(made: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made["deepseek_v3"], tmp_path / "m"))
    for shard in path.glob("*.safetensors"):
        state = load_file(shard)
        if state.pop("model.layers.0.mlp.up_proj.weight", None) is not None:
            save_file(state, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(listed))
    layer = DenseLayer(FIRST, 2, CPU)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        DenseReader(path, 2, torch.float32, CPU).load([layer], (0,))
    assert layer.shards == {}, "no half of a shard"


# ---- in the place of a module ---------------------------------------------------------------


class Mlp(nn.Module):
    """A gated feed-forward layer, or nearly."""

    def __init__(self, bias: bool = False, extra: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=bias) if gated else None
        self.up_proj, self.down_proj = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8) if extra else None
        self.act_fn = nn.GELU()


class Decoder(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class Model(nn.Module):
    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Decoder, mlps))
        self.mlp = Mlp()
        """Belongs to no layer."""


def test_only_the_layers_asked_for_are_replaced() -> None:
    plain = [Mlp(), Mlp(), Mlp(bias=True)]
    model = Model(*plain)
    layer = DenseLayer(LayerId(1), 2, CPU)
    replace_dense(model, {LayerId(1): layer})
    assert [d.mlp for d in model.layers][::2] == plain[::2]
    assert isinstance(model.layers[1].mlp, ShardedMlp)
    assert isinstance(model.mlp, Mlp)
    assert layer.act is plain[1].act_fn
    assert list(model.layers[1].mlp.parameters()) == [], "nothing is left to be read"


@pytest.mark.parametrize("kind", [{"bias": True}, {"extra": True}, {"gated": False}], ids=str)
def test_a_module_that_cannot_be_cut_is_refused(kind: dict[str, bool]) -> None:
    model = Model(Mlp(), Mlp(**kind))
    layers = {LayerId(i): DenseLayer(LayerId(i), 2, CPU) for i in (0, 1)}
    with pytest.raises(CheckpointError, match=r"--dense-ffn-tp: layer 1 of Model is no plain"):
        replace_dense(model, layers)
    replace_dense(Model(Mlp(), Mlp(**kind)), {FIRST: layers[FIRST]})


def test_without_shared_layers_nothing_is_replaced() -> None:
    model = Model(Mlp(bias=True))
    replace_dense(model, {})
    assert isinstance(model.layers[0].mlp, Mlp)


# ---- where tokens go ------------------------------------------------------------------------


def entered(groups: DenseGroups, me: int, num_ranks: int = 4) -> DenseLayer:
    layer = DenseLayer(FIRST, groups.size, CPU)
    layer.enter(without_experts(collocated(Epoch(1), num_ranks), groups), RankId(me))
    return layer


PAIRS = form_groups(tuple(map(RankId, range(4))), 2)


@pytest.mark.parametrize(
    ("me", "expected"),
    [
        (0, [[0, 3], [4, 7], [0, 3]]),  # logical rank * 2 + shard: ranks 0 and 1, then 2 and 3
        (1, [[4, 7], [0, 3], [4, 7]]),
        (2, [[0, 3], [4, 7], [0, 3]]),
    ],
)
def test_tokens_go_round_the_groups(me: int, expected: list[list[int]]) -> None:
    layer = entered(PAIRS, me)
    assert layer.slots_of(3).tolist() == expected
    assert layer.slots_of(0).shape == (0, 2)


def test_tokens_go_to_healthy_groups_under_their_present_logical_ranks() -> None:
    topology = disaggregated(Epoch(1), 5, 1)
    groups = form_groups(topology.attention, 2)
    left = tuple(RankId(r) for r in (1, 2, 3, 4))
    after = groups.without(frozenset({RankId(0)})).completed(left)
    moved = type(topology)(Epoch(2), (*left, RankId(5)), left, (RankId(5),))
    layer = DenseLayer(FIRST, 2, CPU)
    layer.enter(without_experts(moved, after), RankId(1))
    assert layer.slots_of(2).tolist() == [[2, 5]] * 2, "logical ranks 1 and 2"
    assert dense_servers(after, moved) == (1, 2)
    assert dense_servers(groups, topology) == (0, 1, 2, 3), "rank 4 holds no shard"


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
def test_groups_share_the_work(num_tokens: int) -> None:
    counts = [0, 0]
    for me in range(4):
        first = entered(PAIRS, me).slots_of(num_tokens)[:, 0]
        for group, slot in enumerate((0, 4)):
            counts[group] += int((first == slot).sum())
    assert counts[0] == counts[1] == 2 * num_tokens


def test_one_rank_alone_holds_all_shards() -> None:
    alone = entered(DenseGroups(4, (), extra=((RankId(2),) * 4,)), 0)
    assert alone.slots_of(1).tolist() == [[8, 9, 10, 11]]


def test_the_start_up_probe_needs_no_exchange() -> None:
    mlp = ShardedMlp(DenseLayer(FIRST, 2, CPU), nn.SiLU())
    hidden = tokens(3)[None]
    assert mlp(hidden).shape == hidden.shape


# ---- through the runner ---------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_with_sharded_layers_gives_the_same_tokens(
    made: dict[str, Path], arch: str, num_shards: int, microbatches: int
) -> None:
    """One rank in a domain of one holds all shards."""
    params = SamplingParams(seed=0, temperature=0.0, max_tokens=10)
    prompts = [[7, 8, 9, 10, 11], list(range(20, 50)), [99]]
    expected = SoloRank(made[arch], LIMITS).run(prompts, params)
    solo = SoloRank(made[arch], LIMITS)
    info = inspect_checkpoint(made[arch])
    slots = dict.fromkeys(map(LayerId, info.moe_layers), tuple(range(16)))
    dense = DenseSpec((FIRST,), num_shards, tuple(range(num_shards)))
    runner = ModelRunner(made[arch], slots, 16, info.top_k, torch.float32, CPU, dense=dense)
    runner.allocate(LIMITS.num_blocks, LIMITS.block_size)
    groups = DenseGroups(num_shards, (), extra=((ME,) * num_shards,))
    placement = ExpertPlacement(16, tuple(slots), {ME: tuple(slots.values())})
    experts, shards = (_counting(microbatches, slots) for slots in (16, num_shards))
    alone = membership(placement, dense=groups)
    runner.enter(experts, alone, ME)
    runner.exchange.enter_dense(shards, alone, ME)
    solo.runner = runner
    assert solo.run(prompts, params) == expected
    assert shards[0].num_sent > 10, "the dense layer goes through the exchange, on its own way"
    assert [d.num_sent for d in experts] == [3 * d.num_sent for d in shards]
    reached: list[int] = []
    runner.exchange.on_phase = lambda phase, layer, _: reached.append(layer)
    runner.serve()
    assert list(dict.fromkeys(reached)) == [0, 1, 2, 3, -1], "in the model's order without tokens"


class Counting(Dispatcher):
    """Counts what is sent."""

    num_sent = 0

    def send(self, *args: Any) -> Any:
        self.num_sent += 1
        return super().send(*args)


def _counting(count: int, slots_per_rank: int) -> list[Counting]:
    return [
        Counting(
            SoloTransport(Waiter(FenceFlag(), EPOCH, 10.0), EPOCH, (ME,), ME, CPU), slots_per_rank
        )
        for _ in range(count)
    ]
