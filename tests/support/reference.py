"""The truth that served tokens are compared with: transformers itself, one prompt at a time.

Nothing here is shared with the product except the sampler (`generate` draws differently).

Legend: T positions, E experts, V vocabulary.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revivemoe.bench.routing import NOTHING, Masked, choice, routers
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.model.sampling import SamplingRow, sample, token_logprobs
from revivemoe.sampling_params import SamplingParams, finish_reason


@dataclass(frozen=True)
class Reference:
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def reference_tokens(
    model: Any,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    max_model_len: int,
    masked: Masked = NOTHING,
) -> list[int]:
    """What a correct server answers: by `generate` where greedy, else by a plain loop."""
    if _generate_can(params):
        with torch.inference_mode(), masked_experts(model, masked):
            return _generate(model, prompt_ids, params, max_model_len)
    return reference(model, prompt_ids, params, max_model_len, masked).token_ids


@torch.inference_mode()
def reference(
    model: Any,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    max_model_len: int,
    masked: Masked = NOTHING,
) -> Reference:
    """Tokens and, where asked for, their log-probabilities."""
    with masked_experts(model, masked):
        return generate_batch(model, [list(prompt_ids)], params, max_model_len)[0]


def generate_batch(
    model: Any, prompts: list[list[int]], params: SamplingParams, max_model_len: int
) -> list[Reference]:
    """A plain decode loop over prompts of one length, with our sampler. Rows stop on their own."""
    assert len({len(p) for p in prompts}) == 1, "the prompts of a batch have one length"
    outputs: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[TokenLogprobs | None]] = [[] for _ in prompts]
    cache, inputs = None, torch.tensor(prompts)
    while True:
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        histories = zip(prompts, outputs, strict=True)
        drawn = sample(out.logits[:, -1], [SamplingRow(params, p, o) for p, o in histories])
        live = [
            finish_reason(params, len(p), o, max_model_len) is None
            for p, o in zip(prompts, outputs, strict=True)
        ]
        if not any(live):
            return [Reference(o, lp) for o, lp in zip(outputs, logprobs, strict=True)]
        for i, token in enumerate(drawn):
            if live[i]:
                outputs[i].append(token.token_id)
                logprobs[i].append(token.logprobs)
        inputs = torch.tensor([[token.token_id] for token in drawn])


@torch.inference_mode()
def reference_prompt_logprobs(
    model: Any, prompt_ids: Sequence[int], num_top: int, masked: Masked = NOTHING
) -> list[TokenLogprobs]:
    """For prompt positions 1 and up: position 0 has no predecessor."""
    with masked_experts(model, masked):
        logits_TV = model(input_ids=torch.tensor([list(prompt_ids)])).logits[0]
    targets = list(prompt_ids[1:])
    return token_logprobs(logits_TV[:-1], targets, [num_top] * len(targets))


def _generate_can(params: SamplingParams) -> bool:
    penalties = params.presence_penalty, params.frequency_penalty
    return params.temperature == 0 and params.logprobs is None and penalties == (0, 0)


def _generate(
    model: Any, prompt_ids: Sequence[int], params: SamplingParams, max_model_len: int
) -> list[int]:
    ends = [*params.eos_token_ids, *params.stop_token_ids]
    saved = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ends or None  # otherwise its own would end the text
    try:
        out = model.generate(
            torch.tensor([list(prompt_ids)]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=min(params.max_tokens, max_model_len - len(prompt_ids)),
            min_new_tokens=(params.min_tokens or None) if ends else None,
            repetition_penalty=params.repetition_penalty,
        )
    finally:
        model.generation_config.eos_token_id = saved
    tokens: list[int] = out[0, len(prompt_ids) :].tolist()
    return tokens


# ---- masks ----------------------------------------------------------------------------------


@contextmanager
def masked_experts(model: Any, masked: Masked) -> Iterator[None]:
    """While inside, the routers of `masked` layers choose among the other experts only."""
    if not masked:
        yield
        return
    patched = [r for layer, r in routers(model).items() if layer in masked]
    before = [r.__dict__.get("forward") for r in patched]
    try:
        for layer, router in routers(model).items():
            if layer in masked:
                router.forward = _masked_forward(router, masked[layer])
        yield
    finally:
        for router, forward in zip(patched, before, strict=True):
            if forward is None:
                del router.forward  # the class's own shows through again
            else:
                router.forward = forward


def _masked_forward(router: Any, masked: Set[int]) -> Any:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        sigmoid = hasattr(router, "e_score_correction_bias")
        weight = router.weight.float() if sigmoid else router.weight
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight)
        seen = choice(router, logits, masked)
        experts = seen.scores_TE.topk(router.top_k, dim=-1).indices
        weights = seen.weights_TE.gather(-1, experts)
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * getattr(router, "routed_scaling_factor", 1.0)
        return logits, weights.to(torch.float32 if sigmoid else logits.dtype), experts

    return forward


__all__ = [
    "NOTHING",
    "Masked",
    "Reference",
    "choice",
    "generate_batch",
    "masked_experts",
    "reference",
    "reference_prompt_logprobs",
    "reference_tokens",
    "routers",
]
