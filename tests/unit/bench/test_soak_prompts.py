"""The soak's own screening, against that of the tests and another way to generate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import reference_tokens
from support.screen import is_safe
from transformers import AutoModelForCausalLM

from revivemoe.bench.soak import prompts
from revivemoe.bench.soak.load import Request
from revivemoe.bench.soak.prompts import LENGTHS, screened_requests
from revivemoe.checkpoint.make import make_model
from revivemoe.sampling_params import SamplingParams

OF_EACH_LENGTH = 2


@pytest.fixture(autouse=True, scope="module")
def few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "OF_EACH_LENGTH", OF_EACH_LENGTH)
        patch.setattr(prompts, "OUTPUT_TOKENS", 40)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soak") / "model"
    make_model(path, "qwen3_moe", "tiny", 0)
    return path


@pytest.fixture(scope="module")
def drawn(model_dir: Path) -> list[Request]:
    return screened_requests(model_dir, 3)


def prompt_of(request: Request) -> list[int]:
    prompt: Any = request.body["prompt"]
    return list(prompt)


def test_prompts_are_safe_and_yield_what_is_expected(model_dir: Path, drawn: list[Request]) -> None:
    lengths = [len(prompt_of(request)) for request in drawn]
    assert lengths == list(LENGTHS) * OF_EACH_LENGTH
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for request in drawn:
        expected = request.expected
        params = SamplingParams(seed=0, temperature=0.0, max_tokens=len(expected))
        assert is_safe(model, prompt_of(request), expected, params)
    for request in drawn[: len(LENGTHS)]:
        params = SamplingParams(seed=0, temperature=0.0, max_tokens=len(request.expected))
        assert reference_tokens(model, prompt_of(request), params, 512) == request.expected


def test_a_seed_says_which(model_dir: Path, drawn: list[Request]) -> None:
    same, other = screened_requests(model_dir, 3), screened_requests(model_dir, 4)
    assert [r.body for r in same] == [r.body for r in drawn] != [r.body for r in other]
