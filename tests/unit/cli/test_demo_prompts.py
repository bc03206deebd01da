"""The demo compares two runs token by token: its prompts must leave no choice to rounding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.screen import is_safe
from transformers import AutoModelForCausalLM

from revivemoe.cli.demo_run import OUTPUT_TOKENS, STREAMS, make_demo_model, requests
from revivemoe.model.sampling import SamplingRow, sample
from revivemoe.sampling_params import SamplingParams


def params_of(body: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        seed=body["seed"], temperature=body["temperature"], max_tokens=body["max_tokens"]
    )


@torch.inference_mode()
def answers(model: Any, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """What `transformers` says to all of them, in one batch."""
    outputs: list[list[int]] = [[] for _ in bodies]
    cache, inputs = None, torch.tensor([body["prompt"] for body in bodies])
    for _ in range(OUTPUT_TOKENS):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        rows = [
            SamplingRow(params_of(b), b["prompt"], o) for b, o in zip(bodies, outputs, strict=True)
        ]
        drawn = [token.token_id for token in sample(out.logits[:, -1], rows)]
        for output, token in zip(outputs, drawn, strict=True):
            output.append(token)
        inputs = torch.tensor(drawn)[:, None]
    return outputs


def unsafe(model: Any, bodies: list[dict[str, Any]]) -> list[int]:
    """Streams somewhere along which a margin is narrow."""
    return [
        number
        for number, (body, output) in enumerate(zip(bodies, answers(model, bodies), strict=True))
        if not is_safe(model, body["prompt"], output, params_of(body))
    ]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model this small only loses by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("one_thread")
def test_every_prompt_of_the_demo_is_safe(tmp_path: Path) -> None:
    make_demo_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    bodies = requests("float32")
    assert len(bodies) == STREAMS
    assert not unsafe(model, bodies), "choose other PROMPT_SEEDS for these streams"
