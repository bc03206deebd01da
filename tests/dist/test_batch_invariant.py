"""In bfloat16, from prompts that nobody screened: the same bits, whoever dies meanwhile."""

import os
import random
from collections.abc import Iterator

import pytest
from support.cases import Weights
from support.client import Answer, Choice, Request, run_load
from support.deployment import Deployment, deployed, with_status
from support.faults import killer

pytestmark = pytest.mark.usefixtures("native")
STREAMS, RANKS, TOKENS = 8, 4, 32
STEPS_IN = 9
"""Steps of the load before the fault."""
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


FLAGS = (
    "--dtype", "bfloat16", "--batch-invariant", "--redundant-experts", "16",
    "--enable-fault-injection",
)  # fmt: skip
POINTS = [
    *(("kill", phase) for phase in ("schedule", "attention", "dispatch", "experts", "combine")),
    ("kill", "sample"), ("kill", "commit"), ("error", "experts"), ("nan", "attention"),
    ("nan", "experts"), ("nan", "combine"), ("hang", "dispatch"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(qwen: Weights) -> Iterator[Deployment]:
    with deployed(qwen.dir, RANKS, *FLAGS) as deployment:
        yield deployment


@pytest.mark.timeout(60 + 20 * KILLS)
def test_bits_survive_kills(server: Deployment, chaos_seed: int) -> None:
    """Tokens and log-probabilities of greedy and of drawn streams; each time another rank dies,
    its experts are found elsewhere, and it comes back.
    """
    draw, asked = random.Random(chaos_seed), requests(chaos_seed)
    print(f"seed {chaos_seed}")
    expected = whole(server, asked)
    for count in range(KILLS):
        victim = count % RANKS
        moment = victim, draw.randrange(1, STREAMS * TOKENS * 3 // 5)
        got = choices_of(run_load(server.url, asked, killer(server, moment)))
        assert got == expected, f"rank and token {moment}"
        server.await_rejoin(victim)


@pytest.mark.timeout(60)
def test_bits_survive_a_fault_at_some_point(server: Deployment, chaos_seed: int) -> None:
    strike(server, chaos_seed, random.Random(chaos_seed).choice(POINTS))


@pytest.mark.matrix
@pytest.mark.parametrize("point", POINTS, ids="-".join)
def test_bits_survive_faults(server: Deployment, chaos_seed: int, point: tuple[str, str]) -> None:
    strike(server, chaos_seed, point)


def whole(server: Deployment, asked: list[Request]) -> list[Choice]:
    """What is answered while nothing fails."""
    expected = choices_of(run_load(server.url, asked))
    assert all(len(choice.token_ids) == TOKENS for choice in expected)
    assert all(len(choice.scored) == TOKENS for choice in expected)
    return expected


def strike(server: Deployment, seed: int, point: tuple[str, str]) -> None:
    """One fault in the middle of a load, in a layer of its own where there is one."""
    kind, phase = point
    draw, asked = random.Random(seed), requests(seed)
    expected, victim, layer = whole(server, asked), draw.randrange(RANKS), draw.randrange(4)
    before = server.await_idle()
    at = {"step": max(e["last_step"] for e in before["engines"]) + STEPS_IN, "phase": phase}
    if phase in ("attention", "dispatch", "experts", "combine"):
        at["layer"] = layer
    server.inject(victim, kind, at, {})
    got = choices_of(run_load(server.url, asked))
    assert got == expected, f"seed {seed}: {kind} at {phase}, rank {victim}, layer {layer}"
    after = server.await_idle()
    assert len(after["recoveries"]) > len(before["recoveries"]), "it has struck"
    for engine in with_status(after, "dead"):
        server.await_rejoin(engine["id"])
