"""Greedy tokens of every family equal `transformers`' generate, alone and across ranks."""

from collections.abc import Callable
from functools import cache

import pytest
from support.cases import MAX_MODEL_LEN, Case, Weights, check_all, plain_cases, requests_of
from support.client import Request, run_load
from support.deployment import deployed, kill
from support.reference import reference_tokens
from support.solo import SoloRank

from revivemoe.checkpoint.presets import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.sampling_params import SamplingParams

GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=24)
PROMPT_LENS = (1, 150, 7, 40, 90, 1, 23, 64)
MAX_BATCHED, BESIDE_DECODES, BLOCK = 32, 8, 8


@pytest.fixture(scope="module")
def cases_of(weights_of: Callable[[str], Weights]) -> Callable[[str], list[Case]]:
    """Screened prompts with the tokens that `generate` gives, by architecture."""

    @cache
    def cases(arch: str) -> list[Case]:
        weights = weights_of(arch)
        return [
            Case(
                case.name,
                case.request,
                [reference_tokens(weights.model, prompt_of(case), GREEDY, MAX_MODEL_LEN)],
            )
            for case in plain_cases(weights, GREEDY, len(PROMPT_LENS), PROMPT_LENS)
        ]

    return cases


def prompt_of(case: Case) -> list[int]:
    prompt: list[int] = case.request.body["prompt"]
    return prompt


@pytest.mark.parametrize("arch", ARCHS)
def test_one_rank(
    arch: str, weights_of: Callable[[str], Weights], cases_of: Callable[[str], list[Case]]
) -> None:
    limits = RankLimits(
        num_blocks=200,
        block_size=BLOCK,
        max_num_seqs=16,
        max_num_batched_tokens=MAX_BATCHED,
        max_model_len=256,
        prefill_tokens_beside_decodes=BESIDE_DECODES,
    )
    solo = SoloRank(weights_of(arch).dir, limits)
    cases = cases_of(arch)
    outputs = solo.run([prompt_of(case) for case in cases], GREEDY, steps_apart=3)
    assert outputs == [case.expected[0] for case in cases]
    assert solo.num_mixed_steps > 5


LAYOUTS = {
    "2": (2,),
    "4": (4,),
    "4 in two micro-batches": (4, "--num-microbatches", "2"),
    "1+2 in one micro-batch": (1, "--expert-ranks", "2", "--num-microbatches", "1"),
    "2+2 in two micro-batches": (2, "--expert-ranks", "2"),
    "2+1 in three micro-batches": (2, "--expert-ranks", "1", "--num-microbatches", "3"),
}
SWITCHING = "2+2 in two micro-batches"
"""Here an expert rank is lost, and an attention rank takes its place."""


def _layouts() -> list[tuple[str, str]]:
    """The first family on all; the others on four ranks, and one more where roles switch."""
    pairs = [(ARCHS[0], name) for name in LAYOUTS] + [("deepseek_v3", SWITCHING)]
    return pairs + [(arch, "4") for arch in ARCHS[1:]]


@pytest.mark.parametrize(("arch", "layout"), _layouts())
def test_several_ranks(
    arch: str,
    layout: str,
    weights_of: Callable[[str], Weights],
    cases_of: Callable[[str], list[Case]],
) -> None:
    """Each request is sent when those before it have begun to decode."""
    cases = cases_of(arch)
    requests = [
        Request(r.path, r.body, after_tokens=5 * i) for i, r in enumerate(requests_of(cases))
    ]
    flags = {
        "--max-num-batched-tokens": MAX_BATCHED,
        "--max-num-seqs": 16,
        "--max-prefill-beside-decodes": BESIDE_DECODES,
        "--block-size": BLOCK,
        "--max-model-len": 256,
    }
    pairs = [str(part) for pair in flags.items() for part in pair]
    num_ranks, *roles = LAYOUTS[layout]
    with deployed(weights_of(arch).dir, int(num_ranks), *map(str, roles), *pairs) as server:
        assert not check_all(cases, run_load(server.url, requests))
        if layout == SWITCHING:
            kill(server.pids()[3])
            status = server.await_recovery()
            assert status["recoveries"][-1]["role_switched"] in (0, 1)
            assert status["experts"]["missing"] == []
            assert not check_all(cases, run_load(server.url, requests)), "after a role switch"
