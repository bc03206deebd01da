"""Experts lost without a replica: masked within the bound; beyond it, an end that says why."""

import asyncio
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import msgspec
import pytest
from support.cases import (
    MAX_MODEL_LEN,
    Case,
    Weights,
    body_of,
    check_all,
    plain_cases,
    requests_of,
)
from support.client import Answer, Load, Request, complete, run_load
from support.deployment import Deployment, Status, deployed, kill, with_status
from support.reference import reference, reference_tokens, routers
from support.screen import is_safe, screen
from support.solo import SoloRank

from revivemoe.checkpoint.presets import ARCHS
from revivemoe.core.limits import RankLimits
from revivemoe.sampling_params import SamplingParams

EXPERTS, RANKS, VICTIM = 16, 4, 2
LOST = frozenset(range(VICTIM * EXPERTS // RANKS, (VICTIM + 1) * EXPERTS // RANKS))
GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=32)
SAMPLED = SamplingParams(seed=3, temperature=0.9, max_tokens=32)
LONG = msgspec.structs.replace(GREEDY, max_tokens=96)
BLOCK = 8
HALF_MAY_BE_MISSING = "--max-missing-fraction", "0.5", "--block-size", str(BLOCK)

Masked = Mapping[int, Set[int]]


def masked_by_loss(weights: Weights) -> Masked:
    return dict.fromkeys(routers(weights.model), LOST)


def masked_cases(weights: Weights, params: SamplingParams, masked: Masked) -> list[Case]:
    """Prompts screened under the mask, with what `transformers` answers under it."""
    screened = screen(weights.model, params, 3, prompt_lens=(5, 24, 61), masked=masked)
    return [
        Case(
            f"masked {i}",
            Request("/v1/completions", {**body_of(params), "prompt": s.prompt_ids}),
            [reference_tokens(weights.model, s.prompt_ids, params, MAX_MODEL_LEN, masked)],
        )
        for i, s in enumerate(screened)
    ]


def cached_cases(weights: Weights, masked: Masked) -> list[tuple[Case, Case]]:
    """The same prompts without and with the mask, wide under both, unlike in what they give.

    As many choices as ranks, which the router deals out: every rank comes to cache every prompt.
    """
    pairs = []
    for screened in screen(weights.model, GREEDY, 6, prompt_lens=(50,), seed=21):
        prompt, whole = screened.prompt_ids, screened.output_ids
        output = reference(weights.model, prompt, GREEDY, MAX_MODEL_LEN, masked).token_ids
        if is_safe(weights.model, prompt, output, GREEDY, masked) and output != whole:
            body = {**body_of(GREEDY), "prompt": prompt, "n": RANKS}
            request = Request("/v1/completions", body)
            pairs.append(
                (Case("before", request, [whole] * RANKS), Case("after", request, [output] * RANKS))
            )
    assert pairs, "no prompt is wide with and without the mask: try another seed"
    return pairs


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_masked_experts(arch: str, weights_of: Callable[[str], Weights]) -> None:
    weights = weights_of(arch)
    masked = masked_by_loss(weights)
    fresh = [*masked_cases(weights, GREEDY, masked), *masked_cases(weights, SAMPLED, masked)]
    cached = cached_cases(weights, masked)
    with deployed(weights.dir, RANKS, *HALF_MAY_BE_MISSING) as server:
        for whole, _ in cached:
            assert_full(run_cases(server, [whole]))
        server.await_idle()
        lose_a_rank_under_load(server, weights)
        assert_degraded_status(server.await_idle(), masked)
        for cases in (fresh, [after for _, after in cached]):
            answers = run_cases(server, cases)
            assert {a.header_quality for a in answers} == {"degraded"}
            assert {a.quality for a in answers} == {"degraded"}
        body = complete(server.url, fresh[0].request)
        assert (body.header_quality, body.quality) == ("degraded", "degraded")
        assert body.tokens == fresh[0].expected


def run_cases(server: Deployment, cases: list[Case]) -> list[Answer]:
    answers = run_load(server.url, requests_of(cases))
    assert not check_all(cases, answers)
    return answers


def assert_full(answers: list[Answer]) -> None:
    assert {(a.header_quality, a.quality) for a in answers} == {(None, None)}


def lose_a_rank_under_load(server: Deployment, weights: Weights) -> None:
    """Streams under way go on, whole up to the loss, and say at their end that they are not."""
    cases = plain_cases(weights, LONG, 4, (24,), "under way", seed=22)
    seen: list[int] = []

    async def beside(load: Load) -> None:
        await load.until(lambda: all(answer.num_tokens >= 8 for answer in load.answers))
        seen.extend(answer.num_tokens for answer in load.answers)
        pids = await asyncio.to_thread(server.pids)
        kill(pids[VICTIM])

    answers = run_load(server.url, requests_of(cases), beside)
    assert len(seen) == len(cases)
    for case, answer, count in zip(cases, answers, seen, strict=True):
        (choice,) = answer.choices.values()
        assert choice.token_ids[:count] == case.expected[0][:count]
        assert (len(choice.token_ids), choice.finish_reason) == (LONG.max_tokens, "length")
        assert (answer.header_quality, answer.quality) == (None, "degraded")


def assert_degraded_status(status: Status, masked: Masked) -> None:
    missing = [[layer, expert] for layer in sorted(masked) for expert in sorted(masked[layer])]
    assert (status["state"], status["quality"]) == ("serving", "degraded")
    assert status["experts"]["missing"] == missing
    (recovery,) = status["recoveries"]
    assert recovery["outcome"] == "recovered"
    assert (recovery["experts_masked"], recovery["experts_dropped"]) == (len(missing), 0)
    assert "mask" in recovery["reason"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("few", [False, True], ids=["some", "few left"])
def test_each_familys_router_masks_like_transformers(
    arch: str, few: bool, weights_of: Callable[[str], Weights]
) -> None:
    """Another mask in each layer; `few left`: one group of experts is gone, one has one left."""
    weights = weights_of(arch)
    kept = {0, 1, 2, 3, 4, 9, 10}
    masked = {
        layer: set(range(EXPERTS)) - kept if few else {(layer * 5 + k) % EXPERTS for k in (0, 1, 7)}
        for layer in routers(weights.model)
    }
    cases = masked_cases(weights, GREEDY, masked)
    limits = RankLimits(
        num_blocks=100, block_size=BLOCK, max_num_seqs=8, max_num_batched_tokens=32,
        max_model_len=128, prefill_tokens_beside_decodes=8,
    )  # fmt: skip
    solo = SoloRank(weights.dir, limits, masked)
    outputs = solo.run([c.request.body["prompt"] for c in cases], GREEDY, steps_apart=2)
    assert outputs == [case.expected[0] for case in cases]


def test_beyond_the_bound_streams_end_with_the_reason(qwen: Weights, tmp_path: Path) -> None:
    """Where the policy rules a restart out."""
    cases = plain_cases(qwen, LONG, 4, (24,), "under way", seed=22)
    policy = tmp_path / "policy.toml"
    policy.write_text('[experts]\nrepair = ["reload", "mask"]\n')
    with deployed(qwen.dir, 2, "--recovery-policy", str(policy)) as server:
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.until(lambda: all(answer.num_tokens >= 4 for answer in load.answers))
            kill(pids[1])

        answers = run_load(server.url, requests_of(cases), beside)
        for case, answer in zip(cases, answers, strict=True):
            assert "--max-missing-fraction" in (answer.error or "")
            assert answer.num_ends == 1
            assert answer.tokens[0] == case.expected[0][: answer.num_tokens]
        status = server.status()
        assert status["state"] == "failed"
        assert "rank 1 lost" in status["reason"]
        assert status["recoveries"][0]["outcome"] == "failed"
        assert len(with_status(status, "dead")) >= 1
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        refused = complete(server.url, cases[0].request)
        assert refused.status == 503
        assert "--max-missing-fraction" in (refused.error or "")
        assert server.stop(timeout_s=10) == 1, "the exit status of a failed instance"
