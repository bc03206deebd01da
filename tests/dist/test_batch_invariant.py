"""In bfloat16, from prompts that nobody screened: the same bits, whoever dies meanwhile."""

import os
import random

import pytest
from support.cases import Weights
from support.client import Answer, Choice, Request, run_load
from support.deployment import deployed
from support.faults import killer

pytestmark = pytest.mark.usefixtures("native")
STREAMS, RANKS, TOKENS = 8, 4, 32
KILLS = int(os.environ.get("REVIVEMOE_TEST_KILLS", "1"))


def requests(seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            "/v1/completions",
            {
                "prompt": [draw.randrange(5, 500) for _ in range(draw.randrange(1, 80))],
                "max_tokens": TOKENS, "temperature": float(i % 2), "seed": i, "ignore_eos": True,
                "stream": True, "logprobs": 2, "return_token_ids": True,
            },
        )
        for i in range(STREAMS)
    ]  # fmt: skip


def choices_of(answers: list[Answer]) -> list[Choice]:
    assert all(answer.error is None for answer in answers), [a.error for a in answers]
    return [answer.choices[0] for answer in answers]


@pytest.mark.timeout(60 + 20 * KILLS)
def test_bits_survive_kills(qwen: Weights, chaos_seed: int) -> None:
    """Tokens and log-probabilities of greedy and of drawn streams; each time another rank dies,
    its experts are found elsewhere, and it comes back.
    """
    flags = "--dtype", "bfloat16", "--batch-invariant", "--redundant-experts", "16"
    draw, asked = random.Random(chaos_seed), requests(chaos_seed)
    print(f"seed {chaos_seed}")
    with deployed(qwen.dir, RANKS, *flags) as server:
        expected = choices_of(run_load(server.url, asked))
        assert all(len(choice.token_ids) == TOKENS for choice in expected)
        assert all(len(choice.scored) == TOKENS for choice in expected)
        for count in range(KILLS):
            victim = count % RANKS
            moment = victim, draw.randrange(1, STREAMS * TOKENS * 3 // 5)
            got = choices_of(run_load(server.url, asked, killer(server, moment)))
            assert got == expected, f"rank and token {moment}"
            if count + 1 < KILLS:
                server.await_rejoin(victim)
