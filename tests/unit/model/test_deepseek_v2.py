"""DeepSeek-V2, which `make-model` does not make: loaded whole, and masked, through the runner."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import reference_tokens
from support.solo import SoloRank
from transformers import AutoModelForCausalLM, DeepseekV2Config, GenerationConfig

from revivemoe.checkpoint.weights import fill_weights
from revivemoe.core.limits import RankLimits
from revivemoe.model.router import grouped_softmax
from revivemoe.sampling_params import SamplingParams

GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=16)
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


@pytest.fixture(scope="module", params=["greedy", "group_limited_greedy"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, `transformers`' model) of a tiny random checkpoint."""
    path = tmp_path_factory.mktemp("deepseek_v2")
    config = DeepseekV2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, n_routed_experts=16, n_shared_experts=1,
        num_experts_per_tok=4, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=48,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_group=4, topk_group=2,
        topk_method=request.param, routed_scaling_factor=2.5,
    )  # fmt: skip
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_weights(whole, 0)
    whole.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    whole.save_pretrained(path)
    return path, AutoModelForCausalLM.from_pretrained(path).eval()


def prompts() -> list[list[int]]:
    torch.manual_seed(5)
    return [torch.randint(5, 512, (length,)).tolist() for length in (3, 21, 40)]


def test_tokens_equal_generate(model: tuple[Path, Any]) -> None:
    path, whole = model
    expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    assert SoloRank(path, LIMITS).run(prompts(), GREEDY, steps_apart=2) == expected


def test_it_is_masked_by_its_own_form(model: tuple[Path, Any]) -> None:
    """A group dead, another with one expert left; as in the model with these experts unlikely."""
    path, whole = model
    missing = {0, 1, 2, 3, 5, 6, 7}
    solo = SoloRank(path, LIMITS, {1: missing, 2: missing})
    assert solo.runner.maskable
    assert {r.form for r in solo.runner.generator.routers.values()} == {grouped_softmax}
    hooks = [
        layer.mlp.gate.register_forward_hook(_masked(missing)) for layer in whole.model.layers[1:]
    ]
    try:
        expected = [reference_tokens(whole, p, GREEDY, LIMITS.max_model_len) for p in prompts()]
    finally:
        for hook in hooks:
            hook.remove()
    assert solo.run(prompts(), GREEDY, steps_apart=2) == expected


def _masked(missing: set[int]) -> Any:
    """Choose again, token by token, among the experts that are left."""

    def choose(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, experts = output
        for row, logits_E in enumerate(logits.clone()):
            logits_E[list(missing)] = -torch.inf
            probs = logits_E.softmax(-1)
            if router.topk_method != "greedy":
                peaks = torch.stack([p.max() for p in probs.chunk(4)])
                closed = [g for g in range(4) if g not in peaks.topk(2).indices]
                for group in closed:
                    probs[4 * group : 4 * group + 4] = 0
            top = probs.topk(4)
            weights[row], experts[row] = top.values * 2.5, top.indices
        return logits, weights, experts

    return choose
