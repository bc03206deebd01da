"""Masked routers against the reference's, on every family."""

import copy
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import masked_experts, routers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from revivemoe.checkpoint import ARCHS
from revivemoe.model.router import MaskableRouter, find_masked_form

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
