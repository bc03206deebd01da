"""Graph mode: the tokens of eager mode, and nothing compiled anew whatever a recovery changes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.solo import SoloRank
from unit.memberships import membership

from revivemoe.config import cache_folders, compilers
from revivemoe.core.limits import RankLimits
from revivemoe.executor.compile_cache import VARIABLE, compile_cache
from revivemoe.ids import LayerId, RankId
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.model.graphs import Graphs, graphs_made
from revivemoe.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, compilers())), reason="no C++ compiler: graphs cannot be built"
)
LIMITS = RankLimits(
    num_blocks=60, block_size=8, max_num_seqs=8, max_num_batched_tokens=16,
    max_model_len=96, prefill_tokens_beside_decodes=8,
)  # fmt: skip
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=20)
PROMPTS = [[7, 8, 9, 10, 11], list(range(20, 50)), [99]]
MASKED = {1: {0, 5}, 3: {2}}


@pytest.fixture(autouse=True, scope="module")
def from_cache() -> Iterator[None]:
    """What was compiled in an earlier run is found. One thread, as the code is made for."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setenv(VARIABLE, "")
    with compile_cache([folder / "graphs-of-tests" for folder in cache_folders()]):
        yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    "arch", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.matrix)]
)
def test_tokens_are_those_of_eager_mode(made: dict[str, Path], arch: str) -> None:
    solo = SoloRank(made[arch], LIMITS, in_graphs=True)
    assert solo.runner.generator is not None
    assert solo.runner.generator.graphs is not None, solo.graphs
    assert solo.run(PROMPTS, GREEDY, 2) == SoloRank(made[arch], LIMITS).run(PROMPTS, GREEDY, 2)
    kinds = 1 if arch == "qwen3_moe" else 2  # with dense layers
    assert solo.runner.generator.graphs.compiled == 2 * kinds, "not one for each layer"
    assert solo.runner.recompiled == 0


def test_a_mask_comes_and_goes_in_the_same_graph(made: dict[str, Path]) -> None:
    """Other prompts each time: what is cached was computed under another mask."""
    path = made["qwen3_moe"]
    solo = SoloRank(path, LIMITS, in_graphs=True)
    for first, masked in ((7, {}), (100, MASKED), (200, {})):
        enter(solo, masked)
        prompts = [[first, 8, 9, 10, 11], list(range(first, first + 30))]
        eager = SoloRank(path, LIMITS, masked)
        assert solo.run(prompts, GREEDY) == eager.run(prompts, GREEDY), masked
    assert solo.runner.recompiled == 0


def enter(solo: SoloRank, masked: dict[int, set[int]]) -> None:
    """Another epoch, in which these experts are in no slot."""
    layers = tuple(solo.runner.exchange.layers)
    slots = tuple(
        tuple(EMPTY if e in masked.get(layer, ()) else e for e in range(16)) for layer in layers
    )
    placement = ExpertPlacement(16, tuple(map(LayerId, layers)), {RankId(0): slots})
    dispatcher = solo.runner.exchange.lanes[0].dispatcher
    assert dispatcher is not None
    solo.runner.enter([dispatcher], membership(placement), RankId(0))


def test_a_layer_that_runs_without_its_graph_is_counted(made: dict[str, Path]) -> None:
    solo = SoloRank(made["qwen3_moe"], LIMITS, in_graphs=True)
    with torch.compiler.set_stance("force_eager"):
        solo.run(PROMPTS[:1], GREEDY)
    assert solo.runner.recompiled > 0


def test_where_no_graph_fits_nobody_waits_for_another(made: dict[str, Path]) -> None:
    solo = SoloRank(made["qwen3_moe"], LIMITS, in_graphs=True)
    before = graphs_made()
    torch.set_num_threads(2)  # which the compiler goes by
    try:
        eager = SoloRank(made["qwen3_moe"], LIMITS)
        assert solo.run(PROMPTS[:1], GREEDY) == eager.run(PROMPTS[:1], GREEDY)
    finally:
        torch.set_num_threads(1)
    assert solo.runner.recompiled > 0
    assert graphs_made() == before


@pytest.mark.parametrize("at", [0, 2])
def test_layers_run_as_if_no_graphs_were_wanted_where_they_cannot_be_compiled(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At once, or in the middle of the warm-up."""
    rows: list[int] = []

    def shape(query: torch.Tensor, *_: object) -> torch.Tensor:
        rows.append(query.shape[2])
        if len(rows) > at:
            raise RuntimeError("no compiler\nand more about it")
        return query.new_zeros(1, query.shape[2], query.shape[1], 16)

    monkeypatch.setattr(Graphs, "attend", lambda self, *given: shape(*given))
    solo = SoloRank(made["qwen3_moe"], LIMITS, in_graphs=True)
    assert solo.graphs == "none: RuntimeError: no compiler and more about it"
    eager = SoloRank(made["qwen3_moe"], LIMITS)
    assert solo.runner.generator is not None
    assert eager.runner.generator is not None
    for mine, theirs in zip(
        solo.runner.generator.model.modules(), eager.runner.generator.model.modules(), strict=True
    ):
        assert type(mine) is type(theirs)
        assert type(mine.forward) is type(theirs.forward), "kernels of our own, or not"
    assert solo.run(PROMPTS, GREEDY) == eager.run(PROMPTS, GREEDY)
    enter(solo, MASKED)
    other = [[150, 8, 9], list(range(151, 180))]
    masked = SoloRank(made["qwen3_moe"], LIMITS, MASKED)
    assert solo.run(other, GREEDY) == masked.run(other, GREEDY)
