"""Where NaN and infinity are laid: to the first stage with finite input and broken output."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.solo import SoloRank

from revivemoe.core.limits import RankLimits
from revivemoe.core.step import Run, StepHeader
from revivemoe.ids import LayerId, SeqId
from revivemoe.messages.tokens import SequenceSpec
from revivemoe.model.finite import STAGES, FiniteCheck, NonFiniteStep
from revivemoe.sampling_params import SamplingParams

BROKEN = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.bfloat16]
LAYERS = [LayerId(1), LayerId(2), LayerId(4)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and threads that wait for each other suffer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_check() -> FiniteCheck:
    return FiniteCheck(LAYERS, DTYPES, torch.device("cpu"))


# ---- one note -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", BROKEN, ids=str)
def test_one_broken_value_anywhere_is_seen(value: float, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 45), (64, 64), (512, 512)):
        for at in {0, 1, math.prod(shape) // 3, math.prod(shape) - 1} & set(
            range(math.prod(shape))
        ):
            values = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
            values.view(-1)[at] = value
            check = a_check()
            check.note(LAYERS[0], "attention", values)
            assert check.first() == (1, "attention", True), (shape, at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_values_are_no_false_alarm(dtype: torch.dtype) -> None:
    check = a_check()
    limits = torch.finfo(dtype)
    for stage, value in zip(STAGES, (limits.max, limits.min, limits.tiny, -0.0), strict=False):
        check.note(LAYERS[0], stage, torch.full((512, 512), value, dtype=dtype))
    check.note_logits(torch.tensor([limits.max, limits.min] * 999, dtype=dtype)[None])
    assert check.first() is None


def test_nothing_noted_or_empty_is_finite() -> None:
    check = a_check()
    assert check.first() is None
    check.note(LAYERS[0], "rows", torch.zeros(0, 64))
    check.note_logits(torch.zeros(0, 512))
    assert check.first() is None


def test_a_reset_forgets() -> None:
    check = a_check()
    for dtype in DTYPES:
        check.note(LAYERS[1], "experts", torch.tensor([math.nan], dtype=dtype))
    assert check.first()
    check.reset()
    assert check.first() is None


# ---- who made it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (["1 attention"], (1, "attention", True)),
        (["1 router"], (1, "attention", True)),
        (["1 experts"], (1, "experts", True)),
        (["1 experts", "1 rows"], (1, "experts", False)),
        (["1 experts", "1 weights"], (1, "experts", False)),
        (["1 combine"], (1, "combine", False)),
        (["logits"], (-1, "sample", True)),
        (["logits", "4 combine"], (4, "combine", False)),
        (["1 rows"], None),
        # what follows from the first
        (["1 attention", "1 rows", "1 experts", "1 combine", "logits"], (1, "attention", True)),
        (["1 combine", "2 attention", "2 rows", "2 experts", "logits"], (1, "combine", False)),
        (["1 rows", "1 experts", "1 combine", "2 attention"], (1, "experts", False)),
        # what was made here comes first, though something from elsewhere was earlier
        (["1 rows", "1 experts", "2 attention"], (2, "attention", True)),
        (["1 rows", "1 experts", "2 experts"], (2, "experts", True)),
        (["1 combine", "2 attention", "4 experts"], (4, "experts", True)),
        (["1 rows", "1 experts", "logits"], (-1, "sample", True)),
        # several made here
        (["2 attention", "2 experts"], (2, "attention", True)),
        (["4 attention", "2 experts", "logits"], (2, "experts", True)),
    ],
    ids=str,
)  # fmt: skip
def test_blame(broken: list[str], expected: tuple[int, str, bool] | None) -> None:
    check = a_check()
    for layer in LAYERS:
        for stage in STAGES:
            values = torch.ones(2, 8)
            if f"{layer} {stage}" in broken:
                values[1, 3] = math.inf
            check.note(layer, stage, values)
    check.note_logits(torch.full((1, 4), math.nan if "logits" in broken else 1.0))
    assert check.first() == expected


# ---- a whole rank ---------------------------------------------------------------------------

LIMITS = RankLimits(
    num_blocks=40, block_size=4, max_num_seqs=8, max_num_batched_tokens=32,
    max_model_len=64, prefill_tokens_beside_decodes=8,
)  # fmt: skip
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=6)
PROMPT = [7, 8, 9, 10, 11, 12]


@pytest.fixture
def solo(made: dict[str, Path]) -> SoloRank:
    return SoloRank(made["qwen3_moe"], LIMITS)


def a_batch(solo: SoloRank, prompt: list[int] = PROMPT) -> Any:
    """A prefill, ready to be executed; of a prompt beyond the budget, the first chunk."""
    solo.rank.add(SequenceSpec(SeqId(0), prompt, [], GREEDY, 0))
    solo.rank.wake(1)
    batch = solo.rank.begin_step()
    assert isinstance(solo.rank.agree([StepHeader(*solo.rank.header())]), Run)
    solo.rank.mark_executing()
    assert batch.num_tokens == min(len(prompt), LIMITS.max_num_batched_tokens)
    return batch


def poison(solo: SoloRank, part: str, layer: int) -> None:
    """Make one weight NaN, such that `part` of `layer` produces it."""
    model = solo.runner.generator.model.model
    decoder = model.layers[layer]
    with torch.no_grad():
        match part:
            case "attention":
                decoder.self_attn.o_proj.weight[3, 3] = math.nan
            case "router":
                decoder.mlp.gate.original.weight[3, 3] = math.nan
            case "experts":
                decoder.mlp.experts.down_proj[:, 3, 3] = math.nan
            case "sample":
                model.norm.weight[3] = math.nan


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize(
    ("part", "phase"), [("attention", "attention"), ("router", "attention"), ("experts", "experts")]
)
def test_the_stage_that_made_it(solo: SoloRank, part: str, phase: str, layer: int) -> None:
    poison(solo, part, layer)
    with pytest.raises(NonFiniteStep) as raised:
        solo.runner.execute(a_batch(solo))
    error = raised.value
    assert (error.layer, error.phase, error.produced_here) == (layer, phase, True)
    assert solo.runner.exchange.non_finite() == (layer, phase, True)


def test_logits(solo: SoloRank) -> None:
    poison(solo, "sample", -1)
    with pytest.raises(NonFiniteStep, match="sample"):
        solo.runner.execute(a_batch(solo))
    assert solo.runner.exchange.non_finite() == (-1, "sample", True)


def test_rows_of_others_that_break_here(solo: SoloRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without tokens of its own says so too."""
    exchange = solo.runner.exchange
    layer = exchange.layers[LayerId(2)]
    real = exchange.lanes[0].dispatcher.send  # type: ignore[union-attr]

    def with_rows(hidden: Any, slots: Any, weights: Any) -> Any:
        ids = torch.zeros(1, layer.top_k, dtype=torch.int64)
        return real(torch.ones(1, 64), ids + torch.arange(layer.top_k), ids.float() + 0.25)

    monkeypatch.setattr(exchange.lanes[0].dispatcher, "send", with_rows)
    solo.runner.serve()
    assert solo.runner.exchange.non_finite() is None
    poison(solo, "experts", 2)
    with pytest.raises(NonFiniteStep):
        solo.runner.serve()
    assert solo.runner.exchange.non_finite() == (2, "experts", True)


@pytest.mark.parametrize(
    ("what", "phase"),
    [("rows_RH", "experts"), ("weights_RK", "experts"), ("combined", "combine")],
)
def test_what_others_send_is_not_laid_to_this_rank(
    solo: SoloRank, monkeypatch: pytest.MonkeyPatch, what: str, phase: str
) -> None:
    """In the last layer, on the last token; what it leads to in the logits is not either."""
    dispatcher = solo.runner.exchange.lanes[0].dispatcher
    assert dispatcher is not None
    receive, combine = dispatcher.receive, dispatcher.combine
    dispatches, combines = iter(range(4)), iter(range(4))

    def broken(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[-1] = math.inf
        return values

    def dispatched(*args: Any) -> Any:
        arrived = receive(*args)
        if next(dispatches) < 3 or what == "combined":
            return arrived
        return replace(arrived, **{what: broken(getattr(arrived, what))})

    def combined(*args: Any) -> torch.Tensor:
        out = combine(*args)
        return broken(out) if next(combines) == 3 and what == "combined" else out

    monkeypatch.setattr(dispatcher, "receive", dispatched)
    monkeypatch.setattr(dispatcher, "combine", combined)
    with pytest.raises(NonFiniteStep):
        solo.runner.execute(a_batch(solo))
    assert solo.runner.exchange.non_finite() == (3, phase, False)


@pytest.mark.parametrize("phase", ["attention", "experts", "combine", "sample"])
def test_an_injected_nan_is_seen_where_it_was_put(solo: SoloRank, phase: str) -> None:
    at = -1 if phase == "sample" else 2

    def spoil(reached: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        return values * math.nan if (reached, layer) == (phase, at) else values

    solo.runner.exchange.spoil = spoil
    with pytest.raises(NonFiniteStep):
        solo.runner.execute(a_batch(solo))
    assert solo.runner.exchange.non_finite() == (at, phase, phase != "combine")


def test_a_step_after_it_starts_clean(solo: SoloRank) -> None:
    weight = solo.runner.generator.model.model.norm.weight
    saved = weight.clone()
    poison(solo, "sample", -1)
    batch = a_batch(solo)
    with pytest.raises(NonFiniteStep):
        solo.runner.execute(batch)
    with torch.no_grad():
        weight.copy_(saved)
    solo.runner.execute(batch)
    assert solo.runner.exchange.non_finite() is None


def test_each_step_forgets_the_one_before(solo: SoloRank) -> None:
    """Also what it does not note itself: no logits in mid-prefill, no tokens when serving."""
    note, broken = solo.runner.exchange.finite.note, torch.tensor([math.nan])
    solo.runner.exchange.finite.note_logits(broken)
    solo.runner.execute(a_batch(solo, list(range(10, 50))))
    note(LayerId(2), "attention", broken)
    solo.runner.serve()


def test_infinite_hidden_states_that_the_router_squashes(made: dict[str, Path]) -> None:
    """A sigmoid makes 0 or 1 of an infinite logit: the weights alone would not tell."""
    solo = SoloRank(made["deepseek_v3"], LIMITS)
    with torch.no_grad():
        solo.runner.generator.model.model.layers[1].post_attention_layernorm.weight[3] = math.inf
    with pytest.raises(NonFiniteStep):
        solo.runner.execute(a_batch(solo))
    assert solo.runner.exchange.non_finite() == (1, "attention", True)


def test_kv_of_an_undone_step_is_zeroed_and_nothing_else(solo: SoloRank) -> None:
    cache = solo.runner.generator._cache
    assert cache is not None
    for pair in cache.pages:
        for pages in pair:
            pages.fill_(1.0)
    poison(solo, "attention", 0)
    batch = a_batch(solo)
    with pytest.raises(NonFiniteStep):
        solo.runner.execute(batch)
    assert any(pages.isnan().any() for pair in cache.pages for pages in pair)
    solo.runner.zero_written(batch)
    (item,) = batch.items
    written = [item.block_table[p // 4] * 4 + p % 4 for p in range(len(PROMPT))]
    for pair in cache.pages:
        for pages in pair:
            flat = pages.view(-1, *pages.shape[2:])
            assert not flat[written].any()
            others = [slot for slot in range(len(flat)) if slot not in written]
            assert (flat[others] == 1.0).all()


def test_every_phase_of_every_layer_is_reached_with_its_rows(solo: SoloRank) -> None:
    reached: list[tuple[str, int, int]] = []
    solo.runner.exchange.on_phase = lambda *phase: reached.append(phase)
    solo.runner.execute(a_batch(solo))
    tokens = len(PROMPT)
    phases = ("attention", "dispatch", "experts", "combine")
    expected = [(phase, layer, tokens) for layer in range(4) for phase in phases]
    assert reached == [*expected, ("sample", -1, 1)]
    reached.clear()
    solo.runner.serve()
    assert reached == [(phase, layer, 0) for layer in range(4) for phase in phases] + [
        ("sample", -1, 0)
    ]
