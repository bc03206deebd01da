"""Masked routers against the reference's and a plain one, on every family."""

import copy
import inspect
import math
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import masked_experts, routers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HYV3Config,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.hy_v3.modeling_hy_v3 import HYV3TopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from revivemoe.checkpoint import ARCHS
from revivemoe.model.router import (
    MASKED_FORMS,
    MaskableRouter,
    biased_sigmoid,
    biased_softmax,
    find_masked_form,
    grouped_sigmoid,
    grouped_softmax,
    softmax_then_top_k,
    top_k_then_softmax,
    top_k_then_wide_softmax,
)

EXPERTS = 16


@pytest.fixture(scope="module")
def models(made: dict[str, Path]) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {arch: AutoModelForCausalLM.from_pretrained(made[arch]).eval() for arch in ARCHS}
    torch.set_num_threads(threads)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(1))


def mask(missing: Set[int]) -> Tensor:
    return torch.tensor([e in missing for e in range(EXPERTS)])


def scattered(weights: Tensor, experts: Tensor) -> Tensor:
    """[T, E] weight of each expert: free of the order of the choices."""
    return torch.zeros(len(weights), EXPERTS).scatter_add(1, experts, weights.float())


def masked_router(router: nn.Module, missing: Set[int]) -> MaskableRouter:
    wrapped = MaskableRouter(router)
    wrapped.set_missing(mask(missing))
    return wrapped


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_missing_is_the_original_itself(
    models: dict[str, Any], hidden: Tensor, arch: str
) -> None:
    for router in routers(models[arch]).values():
        wrapped = masked_router(router, set())
        with torch.inference_mode():
            for theirs, ours in zip(router(hidden), wrapped(hidden), strict=True):
                assert torch.equal(theirs, ours)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_masked_form_without_a_mask_is_the_original(
    models: dict[str, Any], hidden: Tensor, arch: str
) -> None:
    for router in routers(models[arch]).values():
        form = find_masked_form(router)
        assert form is not None
        with torch.inference_mode():
            for theirs, ours in zip(router(hidden), form(router, hidden, mask(set())), strict=True):
                assert torch.equal(theirs, ours)
                assert theirs.dtype == ours.dtype


@pytest.mark.parametrize(
    "missing",
    [
        {0},
        {15},
        {1, 6, 11},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 9, 10, 11},
        {4, 5, 6, 7, 8, 9, 10, 11},
        set(range(8)) | {8, 9, 10, 12, 13, 14},
    ],
    ids=lambda missing: f"{len(missing)} missing",
)
@pytest.mark.parametrize("arch", ARCHS)
def test_masked_equals_the_reference(
    models: dict[str, Any], hidden: Tensor, arch: str, missing: Set[int]
) -> None:
    """Dead groups, groups of one expert, and fewer experts than a token uses among them."""
    for layer, router in routers(models[arch]).items():
        with torch.inference_mode():
            with masked_experts(models[arch], {layer: missing}):
                _, weights, experts = router(hidden)
                expected = scattered(weights, experts)
            _, weights, experts = masked_router(router, missing)(hidden)
        got = scattered(weights, experts)
        assert not got.isnan().any()
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        assert not set(experts[weights > 0].tolist()) & missing
        assert (got.sum(-1) > 0).all()


def test_a_group_with_one_healthy_expert_is_selectable(
    models: dict[str, Any], hidden: Tensor
) -> None:
    """A group's score is the sum of its two best: the second is gone, the group is not."""
    router = max(routers(models["deepseek_v3"]).items())[1]
    assert (router.num_group, router.topk_group) == (4, 2)
    kept = copy.deepcopy(router)
    kept.e_score_correction_bias[3] = 10.0
    with torch.inference_mode():
        _, weights, experts = masked_router(kept, {0, 1, 2})(hidden)
    assert ((experts == 3) & (weights > 0)).any(-1).all()


@pytest.mark.parametrize("missing", [{4, 5, 6, 7}, {4, 5, 6}, {4, 8, 12}], ids=str)
@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_groups_with_biases_that_turn_scores_negative(
    models: dict[str, Any], hidden: Tensor, bias: float, missing: Set[int]
) -> None:
    """What is missing must not look better than what is there but scores below 0."""
    model = models["deepseek_v3"]
    layer, router = max(routers(model).items())
    saved = router.e_score_correction_bias.clone()
    try:
        router.e_score_correction_bias += bias
        router.e_score_correction_bias[4:8] += 0.1
        with torch.inference_mode():
            with masked_experts(model, {layer: missing}):
                _, weights, experts = router(hidden)
                expected = scattered(weights, experts)
            _, weights, experts = masked_router(router, missing)(hidden)
        torch.testing.assert_close(scattered(weights, experts), expected, atol=1e-6, rtol=1e-5)
        assert not set(experts[weights > 0].tolist()) & missing
    finally:
        router.e_score_correction_bias.copy_(saved)


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_masks_come_and_go(models: dict[str, Any], hidden: Tensor, arch: str) -> None:
    router = max(routers(models[arch]).items())[1]
    wrapped = MaskableRouter(router)
    with torch.inference_mode():
        before = wrapped(hidden)
        wrapped.set_missing(mask({3}))
        assert 3 not in wrapped(hidden)[2]
        wrapped.set_missing(mask(set()))
        for a, b in zip(before, wrapped(hidden), strict=True):
            assert torch.equal(a, b)


def test_hidden_states_of_any_leading_shape(models: dict[str, Any], hidden: Tensor) -> None:
    for arch in ARCHS:
        wrapped = masked_router(max(routers(models[arch]).items())[1], {3})
        with torch.inference_mode():
            flat, shaped = wrapped(hidden), wrapped(hidden.view(3, 100, 64))
        for a, b in zip(flat, shaped, strict=True):
            assert torch.equal(a, b)


# ---- every kind of router against a plain one --------------------------------------------------

TOP_K, GROUPS, OPEN = 4, 4, 2
PER_GROUP = EXPERTS // GROUPS
Weights = dict[int, float]


def exps(logits: list[float], among: list[int]) -> Weights:
    """Softmax over the experts `among`."""
    highest = max(logits[e] for e in among)
    total = sum(math.exp(logits[e] - highest) for e in among)
    return {e: math.exp(logits[e] - highest) / total for e in among}


def best(scores: Weights, count: int) -> list[int]:
    return sorted(scores, key=lambda e: -scores[e])[:count]


def plain_softmax(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    probs = exps(logits, healthy)
    chosen = {e: probs[e] for e in best(probs, TOP_K)}
    total = sum(chosen.values()) if getattr(router, "norm_topk_prob", True) else 1.0
    return {e: weight / total for e, weight in chosen.items()}


def plain_then_softmax(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    return exps(logits, best({e: logits[e] for e in healthy}, TOP_K))


def plain_v2(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    probs = exps(logits, healthy)
    if router.topk_method == "group_limited_greedy":
        groups = {e // PER_GROUP for e in healthy}
        peaks = {g: max(probs[e] for e in healthy if e // PER_GROUP == g) for g in groups}
        opened = best(peaks, OPEN)
        probs = {e: p for e, p in probs.items() if e // PER_GROUP in opened}
    return {e: probs[e] * router.routed_scaling_factor for e in best(probs, TOP_K)}


def plain_v3(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    bias = router.e_score_correction_bias.tolist()
    sigmoid = {e: 1 / (1 + math.exp(-logits[e])) for e in healthy}
    score = {e: sigmoid[e] + bias[e] for e in healthy}
    groups = {e // PER_GROUP for e in healthy}
    sums = {
        g: sum(sorted((score[e] for e in healthy if e // PER_GROUP == g), reverse=True)[:2])
        for g in groups
    }
    opened = best(sums, OPEN)
    chosen = best({e: s for e, s in score.items() if e // PER_GROUP in opened}, TOP_K)
    total = sum(sigmoid[e] for e in chosen)
    return {e: sigmoid[e] / total * router.routed_scaling_factor for e in chosen}


BIAS = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(3)) - 0.5


def beside(router: nn.Module) -> tuple[Tensor, ...]:
    """What some routers are given beside the hidden states."""
    given = inspect.signature(router.forward).parameters
    return (BIAS,) if "e_score_correction_bias" in given else ()


def plain_biased(scores: Weights, bias: list[float]) -> Weights:
    chosen = best({e: s + bias[e] for e, s in scores.items()}, TOP_K)
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / total for e in chosen}


def plain_ernie(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    bias = router.moe_statics.e_score_correction_bias[0].tolist()
    return plain_biased(exps(logits, healthy), bias)


def plain_biased_sigmoid(router: Any, logits: list[float], healthy: list[int]) -> Weights:
    sigmoid = {e: 1 / (1 + math.exp(-logits[e])) for e in healthy}
    scale = getattr(router, "router_scaling_factor", 1.0)
    return {e: w * scale for e, w in plain_biased(sigmoid, BIAS.tolist()).items()}


SIZE = {"hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": TOP_K}
V2 = {**SIZE, "n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5, "topk_method": "greedy"}
GROUPED = {"n_group": GROUPS, "topk_group": OPEN}
BUILT: dict[str, tuple[Any, Any, Any]] = {
    "mixtral": (
        lambda: MixtralTopKRouter(MixtralConfig(**SIZE, num_local_experts=EXPERTS)),
        plain_softmax,
        softmax_then_top_k,
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeTopKRouter(
            Qwen3MoeConfig(**SIZE, num_experts=EXPERTS, norm_topk_prob=True)
        ),
        plain_softmax,
        softmax_then_top_k,
    ),
    "olmoe": (
        lambda: OlmoeTopKRouter(OlmoeConfig(**SIZE, num_experts=EXPERTS, norm_topk_prob=False)),
        plain_softmax,
        softmax_then_top_k,
    ),
    "deepseek_v3": (
        lambda: DeepseekV3TopkRouter(
            DeepseekV3Config(**SIZE, **GROUPED, n_routed_experts=EXPERTS, norm_topk_prob=True)
        ),
        plain_v3,
        grouped_sigmoid,
    ),
    "deepseek_v2 greedy": (
        lambda: DeepseekV2TopkRouter(DeepseekV2Config(**V2)),
        plain_v2,
        grouped_softmax,
    ),
    "deepseek_v2 grouped": (
        lambda: DeepseekV2TopkRouter(
            DeepseekV2Config(**V2 | GROUPED | {"topk_method": "group_limited_greedy"})
        ),
        plain_v2,
        grouped_softmax,
    ),
    "gpt_oss": (
        lambda: GptOssTopKRouter(GptOssConfig(**SIZE, num_local_experts=EXPERTS)),
        plain_then_softmax,
        top_k_then_softmax,
    ),
    "granitemoe": (
        lambda: GraniteMoeTopKRouter(GraniteMoeConfig(**SIZE, num_local_experts=EXPERTS)),
        plain_then_softmax,
        top_k_then_wide_softmax,
    ),
    "ernie4_5_moe": (
        lambda: Ernie4_5_MoeTopKRouter(
            Ernie4_5_MoeConfig(hidden_size=64, moe_num_experts=EXPERTS, moe_k=TOP_K)
        ),
        plain_ernie,
        biased_softmax,
    ),
    "minimax_m2": (
        lambda: MiniMaxM2TopKRouter(MiniMaxM2Config(**SIZE, num_local_experts=EXPERTS)),
        plain_biased_sigmoid,
        biased_sigmoid,
    ),
    "hy_v3": (
        lambda: HYV3TopKRouter(
            HYV3Config(**SIZE, num_local_experts=EXPERTS, router_scaling_factor=2.5)
        ),
        plain_biased_sigmoid,
        biased_sigmoid,
    ),
}
"""How to build the router, the plain one, and the form that must be found for it."""
ALL = set(range(EXPERTS))
MASKS: dict[str, Set[int]] = {
    "none": set(),
    "one": {5},
    "all but K": ALL - {0, 6, 7, 13},
    "fewer than K left": ALL - {2, 9},
    "one left": ALL - {11},
    "a group dead": {4, 5, 6, 7},
    "a group with one left": {0, 1, 2, 5},
    "all groups dead but one": ALL - {8, 9, 10, 11},
    "more open groups than live ones": ALL - {8, 10},
    "all": ALL,
}


def built(family: str, dtype: torch.dtype, spread: float = 0.4) -> Any:
    torch.manual_seed(7)
    router = BUILT[family][0]()
    for parameter in router.parameters():
        parameter.data = (torch.randn(parameter.shape) * spread).to(dtype)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.copy_(torch.rand(EXPERTS) - 0.5)
    return router.requires_grad_(False)


def without_ties(router: Any, hidden: Tensor) -> Tensor:
    """Rows whose logits all differ: which of two equal ones is chosen means nothing."""
    logits = router(hidden, *beside(router))[0]
    kept = torch.tensor([len(set(row)) == EXPERTS for row in logits.tolist()])
    assert kept.sum() >= 30
    return hidden[kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("family", BUILT)
def test_masked_equals_a_plain_router(
    hidden: Tensor, family: str, missing: Set[int], dtype: torch.dtype
) -> None:
    router, (_, plain, _) = built(family, dtype), BUILT[family]
    hidden = without_ties(router, hidden.to(dtype))
    logits, expected_weights, _ = router(hidden, *beside(router))
    _, weights, experts = masked_router(router, missing)(hidden, *beside(router))
    assert (weights.dtype, experts.dtype) == (expected_weights.dtype, torch.int64)
    assert weights.shape == experts.shape == (len(hidden), TOP_K)
    healthy = sorted(ALL - missing)
    tolerance = 1e-5 if weights.dtype == torch.float32 else 1e-2
    for row, logits_E in enumerate(logits.float().tolist()):
        expected = plain(router, logits_E, healthy) if healthy else {}
        assert len(set(experts[row].tolist())) == TOP_K, "choices are distinct"
        got = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert {e for e, w in got.items() if w} == set(expected), row
        for expert, weight in expected.items():
            assert got[expert] == pytest.approx(weight, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BUILT)
def test_exactly_one_form_fits(hidden: Tensor, family: str, dtype: torch.dtype) -> None:
    """Bit for bit without a mask, and none other does: the wrong one would mask wrongly."""
    router = built(family, dtype)
    assert find_masked_form(router) is BUILT[family][2]
    others = [form for form in MASKED_FORMS if form is not BUILT[family][2]]
    for form in others:
        try:
            got = form(router, hidden.to(dtype), mask(set()), *beside(router))
        except (AttributeError, TypeError, RuntimeError):
            continue
        expected = router(hidden.to(dtype), *beside(router))
        pairs = list(zip(got, expected, strict=True))
        same = [a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs]
        assert not all(same), f"{form.__name__} fits too"


@pytest.mark.parametrize("family", BUILT)
def test_a_masked_expert_is_not_chosen_before_one_that_underflowed(
    hidden: Tensor, family: str
) -> None:
    """Logits hundreds apart: most probabilities are 0, as a masked expert's is."""
    router = built(family, torch.float32, spread=100.0)
    for missing in ({0, 1, 2, 4, 5}, {3, 7, 8, 9}, {10, 11, 13, 14, 15}, set(range(4, 16))):
        _, weights, experts = masked_router(router, missing)(hidden, *beside(router))
        assert not weights.isnan().any()
        assert not set(experts.flatten().tolist()) & missing


@pytest.mark.parametrize("family", BUILT)
def test_nan_stays_visible(hidden: Tensor, family: str) -> None:
    """A masked router must not hide a broken hidden state, nor spread it to other tokens."""
    hidden[3, 5] = math.nan
    router = built(family, torch.float32)
    _, weights, _ = masked_router(router, {1, 4})(hidden, *beside(router))
    assert weights.isnan().any(-1).nonzero().flatten().tolist() == [3]


# ---- routers of another kind ----------------------------------------------------------------


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 64))
        self.top_k = 2


class SigmoidWithoutGroups(Router):
    """Looks like the others, and computes something else."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, experts = logits.sigmoid().topk(self.top_k, dim=-1)
        return logits, weights, experts


class OnlyLogits(Router):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


@pytest.mark.parametrize("router", [SigmoidWithoutGroups(), OnlyLogits(), nn.Linear(64, EXPERTS)])
def test_an_unknown_router_is_not_maskable(router: nn.Module, hidden: Tensor) -> None:
    wrapped = MaskableRouter(router)
    assert wrapped.form is None
    wrapped.set_missing(mask(set()))
    with torch.inference_mode():
        ours, theirs = wrapped(hidden), router(hidden)
    assert torch.equal(ours[0], theirs[0])
    with pytest.raises(AssertionError, match="cannot be masked"):
        wrapped.set_missing(mask({1}))


def test_a_router_without_weights_is_not_maskable() -> None:
    assert find_masked_form(nn.Identity()) is None
    assert find_masked_form(nn.Linear(64, EXPERTS, device="meta")) is None
