"""Prompts far longer than a step: a rank dies while they are computed or decoded."""

import random

import pytest
from support.cases import Weights, check_all, plain_cases, requests_of
from support.client import run_load
from support.deployment import deployed
from support.faults import killer

from revivemoe.sampling_params import SamplingParams

OUTPUT_TOKENS = 20


@pytest.mark.timeout(180)
def test_long_prompts_survive_a_kill(qwen: Weights, chaos_seed: int) -> None:
    greedy = SamplingParams(seed=0, temperature=0.0, max_tokens=OUTPUT_TOKENS)
    sampled = SamplingParams(seed=5, temperature=0.9, max_tokens=OUTPUT_TOKENS)
    cases = [case for p in (greedy, sampled) for case in plain_cases(qwen, p, 3, (1500,))]
    draw = random.Random(chaos_seed)
    moment = draw.randrange(3), draw.randrange(1, len(cases) * OUTPUT_TOKENS * 3 // 4)
    told = f"seed {chaos_seed}: rank and token {moment}"
    flags = "--redundant-experts", "16", "--max-model-len", "2048"
    with deployed(qwen.dir, 3, *flags) as server:
        answers = run_load(server.url, requests_of(cases), killer(server, moment))
        assert not check_all(cases, answers), told
        (recovery,) = server.await_idle()["recoveries"]
        assert recovery["outcome"] == "recovered", told
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}, told
