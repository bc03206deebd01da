"""The reference and the screening of prompts, on every family."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import (
    Masked,
    choice,
    generate_batch,
    masked_experts,
    reference,
    reference_prompt_logprobs,
    reference_tokens,
    routers,
)
from support.screen import is_safe, screen, screening_of
from transformers import AutoModelForCausalLM

from revivemoe.checkpoint import ARCHS
from revivemoe.sampling_params import SamplingParams

UNLIKE = ("qwen3_moe", "deepseek_v3")
"""In attention, and in how they choose experts; the others are like one of them."""
GREEDY = SamplingParams(seed=0, temperature=0, max_tokens=24)
DRAWN = SamplingParams(seed=3, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, max_tokens=24)


@pytest.fixture(scope="module")
def models(made: dict[str, Path]) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only lose by more
    yield {arch: AutoModelForCausalLM.from_pretrained(made[arch]).eval() for arch in ARCHS}
    torch.set_num_threads(threads)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 512, (length,), generator=generator).tolist()


@pytest.mark.parametrize("arch", ARCHS)
def test_generate_and_the_loop_agree(models: dict[str, Any], arch: str) -> None:
    model = models[arch]
    for params in (GREEDY, SamplingParams(seed=0, temperature=0, repetition_penalty=1.3)):
        for prompt in (s.prompt_ids for s in screen(model, params, 2, cache_dir=None)):
            by_generate = reference_tokens(model, prompt, params, 4096)
            assert by_generate == reference(model, prompt, params, 4096).token_ids
            assert len(by_generate) == params.max_tokens


def test_ends_and_lengths(models: dict[str, Any]) -> None:
    model, prompt = models["qwen3_moe"], prompt_of(10)
    free = reference_tokens(model, prompt, GREEDY, 4096)
    end = free[7]
    stopping = SamplingParams(seed=0, temperature=0, max_tokens=24, eos_token_ids=(end,))
    assert reference_tokens(model, prompt, stopping, 4096) == free[: free.index(end) + 1]
    assert reference(model, prompt, stopping, 4096).token_ids == free[: free.index(end) + 1]
    assert reference_tokens(model, prompt, GREEDY, 15) == free[:5]
    assert reference(model, prompt, GREEDY, 15).token_ids == free[:5]
    waiting = SamplingParams(
        seed=0, temperature=0, max_tokens=24, eos_token_ids=(end,), min_tokens=20
    )
    by_generate = reference_tokens(model, prompt, waiting, 4096)
    assert by_generate == reference(model, prompt, waiting, 4096).token_ids
    assert end not in by_generate[:20]


def test_logprobs(models: dict[str, Any]) -> None:
    model, prompt = models["olmoe"], prompt_of(10)
    params = SamplingParams(seed=0, temperature=0, max_tokens=4, logprobs=3)
    answer = reference(model, prompt, params, 4096)
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry is not None
        assert entry.top[0][0] == token
        assert len(entry.top) == 3
    assert len(reference_prompt_logprobs(model, prompt, 2)) == 9


# ---- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_an_empty_mask_is_the_original(models: dict[str, Any], arch: str) -> None:
    for router in routers(models[arch]).values():
        hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits, weights, experts = router(hidden)
            with masked_experts(models[arch], {layer: set() for layer in range(4)}):
                assert "forward" in router.__dict__
                same_logits, same_weights, same_experts = router(hidden)
        assert torch.equal(logits, same_logits)
        dense = torch.zeros_like(logits)
        assert torch.allclose(
            dense.scatter(1, experts, weights),
            dense.scatter(1, same_experts, same_weights),
            atol=1e-6,
        )


@pytest.mark.parametrize("arch", ARCHS)
def test_masked_experts_are_never_chosen(models: dict[str, Any], arch: str) -> None:
    model = models[arch]
    layer, router = max(routers(model).items())
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    masked = {0, 1, 2, 3, 9, 10, 11}  # all of group 0, three of group 2
    with torch.inference_mode(), masked_experts(model, {layer: masked}):
        logits, weights, experts = router(hidden)
    used = experts[weights > 0]
    assert not set(used.tolist()) & masked
    assert 8 in used.tolist()  # the last one alive of its group
    assert "forward" not in router.__dict__
    assert choice(router, logits, masked).scores_TE[:, list(masked)].isinf().all()


def test_surplus_choices_have_no_weight(models: dict[str, Any]) -> None:
    """One expert alive in each of four groups, two groups open, top-4: two choices are void."""
    model = models["deepseek_v3"]
    layer, router = max(routers(model).items())
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), masked_experts(model, {layer: set(range(16)) - {0, 5, 10, 15}}):
        _, weights, experts = router(hidden)
    assert ((weights > 0).sum(-1) == 2).all()
    assert set(experts[weights > 0].tolist()) == {0, 5, 10, 15}
    assert torch.allclose(weights.sum(-1), torch.tensor(router.routed_scaling_factor))


@pytest.mark.parametrize("arch", UNLIKE)
def test_a_masked_expert_is_missed(models: dict[str, Any], arch: str) -> None:
    """The text changes within a few tokens if any expert of any layer is left out."""
    model, prompts = models[arch], [prompt_of(16, i) for i in range(8)]

    def answers(masked: Masked) -> list[list[int]]:
        with torch.inference_mode(), masked_experts(model, masked):
            return [a.token_ids for a in generate_batch(model, prompts, GREEDY, 4096)]

    whole = answers({})
    for layer in routers(model):
        for expert in (0, 7, 15):
            assert sum(a != b for a, b in zip(answers({layer: {expert}}), whole, strict=True)) >= 3
    assert answers({}) == whole


# ---- screening ------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("arch", ARCHS)
def test_most_prompts_are_kept(models: dict[str, Any], arch: str, params: SamplingParams) -> None:
    screening = screening_of(models[arch], params, 8, prompt_lens=(8, 24), cache_dir=None)
    assert screening.passed / screening.tried > 0.5
    assert [len(s.prompt_ids) for s in screening.kept] == [8, 24] * 4
    for s in screening.kept[:2]:
        alone = reference_tokens(models[arch], s.prompt_ids, params, 4096)
        assert s.output_ids == alone


@pytest.mark.parametrize("arch", UNLIKE)
def test_long_and_masked_prompts(models: dict[str, Any], arch: str) -> None:
    short = SamplingParams(seed=0, temperature=0, max_tokens=4)
    assert len(screen(models[arch], short, 2, prompt_lens=(1500,), cache_dir=None)) == 2
    masked = {max(routers(models[arch])): {5}}
    for s in screen(models[arch], GREEDY, 2, masked=masked, cache_dir=None):
        assert s.output_ids == reference_tokens(models[arch], s.prompt_ids, GREEDY, 4096, masked)


def test_screening_is_remembered(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["mixtral"]
    first = screen(model, DRAWN, 2, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert screen(model, DRAWN, 2, cache_dir=tmp_path) == first
    assert path.stat().st_mtime_ns == written
    screen(model, DRAWN, 2, seed=1, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_tie_is_not_safe(models: dict[str, Any]) -> None:
    model = models["qwen3_moe"]
    (s,) = screen(model, GREEDY, 1, cache_dir=None)
    assert is_safe(model, s.prompt_ids, s.output_ids, GREEDY)
    head = model.lm_head.weight.data
    saved = head.clone()
    try:
        head[s.output_ids[3] - 1] = head[s.output_ids[3]]
        assert not is_safe(model, s.prompt_ids, s.output_ids, GREEDY)
    finally:
        head.copy_(saved)


@pytest.mark.parametrize("arch", UNLIKE)
def test_text_is_varied_and_ends_are_rare(models: dict[str, Any], arch: str) -> None:
    params = SamplingParams(seed=0, temperature=0, max_tokens=150)
    with torch.inference_mode():
        answers = generate_batch(models[arch], [prompt_of(20, i) for i in range(4)], params, 4096)
    outputs = [answer.token_ids for answer in answers]
    assert all(len(set(output)) > 70 for output in outputs)
    ends = sum(token in (2, 4) for output in outputs for token in output)
    assert ends < 0.02 * 600
    assert not any(token in (0, 1, 3) for output in outputs for token in output)
