"""Prompts of which no choice along the way is narrow, with the tokens they must yield.

`transformers` generates them and looks at every router and every logit again in one forward over
prompt and output. What is left yields the same tokens however steps are batched, in float32.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from revivemoe.bench.loadgen import greedy, random_prompts
from revivemoe.bench.routing import LOGIT_MARGIN, ROUTER_GAP, observed_gaps
from revivemoe.bench.soak.load import Request

LENGTHS = (12, 40, 100)
"""Prompt tokens: some need more than one step for their prefill."""
OF_EACH_LENGTH = 6
OUTPUT_TOKENS = 96
ROUNDS = 20


def screened_requests(model_dir: Path, seed: int) -> list[Request]:
    """Greedy completions, of all lengths in turn. Raises ValueError if margins are too narrow."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only loses by more
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    draw = random.Random(seed)
    by_length = [_of_length(model, model_dir, length, draw) for length in LENGTHS]
    torch.set_num_threads(threads)
    return [request for requests in zip(*by_length, strict=True) for request in requests]


def _of_length(
    model: nn.Module, model_dir: Path, length: int, draw: random.Random
) -> list[Request]:
    found: list[Request] = []
    for _ in range(ROUNDS):
        prompts = random_prompts(draw, OF_EACH_LENGTH, length)
        bodies = greedy(model_dir, prompts, OUTPUT_TOKENS)
        outputs = generated(model, prompts, OUTPUT_TOKENS)
        candidates = zip(prompts, bodies, outputs, strict=True)
        found += [
            Request(body, out) for prompt, body, out in candidates if wide(model, prompt, out)
        ]
        if len(found) >= OF_EACH_LENGTH:
            return found[:OF_EACH_LENGTH]
    raise ValueError(f"{model_dir}: too few prompts of {length} tokens have wide margins")


@torch.inference_mode()
def generated(model: nn.Module, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """So many tokens for each of some prompts of one length, whatever ends a text."""
    outputs: list[list[int]] = [[] for _ in prompts]
    inputs, cache = torch.tensor(prompts), None
    for _ in range(count):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, inputs = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        for output, token in zip(outputs, inputs[:, 0].tolist(), strict=True):
            output.append(token)
    return outputs


@torch.inference_mode()
def wide(model: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether every choice of experts and of a token had room for rounding."""
    with observed_gaps(model) as gaps:
        logits_TV = model(input_ids=torch.tensor([[*prompt, *output]])).logits[0]
    if float(gaps.smallest()[:-1].min()) < ROUTER_GAP:  # the last token's output goes nowhere
        return False
    best_T2 = logits_TV[len(prompt) - 1 : -1].topk(2)
    if best_T2.indices[:, 0].tolist() != list(output):
        return False
    return bool((best_T2.values[:, 0] - best_T2.values[:, 1]).min() >= LOGIT_MARGIN)
