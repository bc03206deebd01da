"""Dense feed-forward layers in shards over groups of ranks: lost shards, lost groups, reloads."""

import asyncio
from collections.abc import Callable

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, deployed, kill

from revivemoe.sampling_params import SamplingParams

ARCH = "deepseek_v3"


@pytest.fixture(scope="module")
def deepseek(weights_of: Callable[[str], Weights]) -> Weights:
    return weights_of(ARCH)


@pytest.fixture(scope="module")
def cases(deepseek: Weights) -> list[Case]:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=48)
    return plain_cases(deepseek, params, 8, (5, 24, 60))


async def kill_under_way(load: Load, server: Deployment, rank: int) -> None:
    pids = await asyncio.to_thread(server.pids)
    await load.until(lambda: all(answer.num_tokens > 4 for answer in load.answers))
    kill(pids[rank])


def groups(server: Deployment) -> list[tuple[list[int], bool]]:
    return [(g["ranks"], g["healthy"]) for g in server.status()["dense_ffn_groups"]]


@pytest.mark.parametrize(
    ("ranks", "flags", "steps"),
    [
        (
            (5,),
            ("--redundant-experts", "32"),
            [
                (None, [([0, 1], True), ([2, 3], True)]),
                (1, [([0, 1], False), ([2, 3], True)]),
                (2, [([0, 1], False), ([2, 3], False), ([0, 3], True)]),
                (3, [([0, 1], False), ([2, 3], False), ([0, 4], True)]),
            ],
        ),
        (
            (2,),
            ("--expert-ranks", "2", "--redundant-experts", "16"),
            [
                (None, [([0, 1], True)]),
                (0, [([0, 1], False), ([1, 1], True)]),
            ],
        ),
    ],
    ids=["collocated", "disaggregated"],
)
def test_tokens_go_to_healthy_groups(
    deepseek: Weights,
    cases: list[Case],
    ranks: tuple[int],
    flags: tuple[str, ...],
    steps: list[tuple[int | None, list[tuple[list[int], bool]]]],
) -> None:
    with deployed(deepseek.dir, *ranks, "--dense-ffn-tp", "2", *flags) as server:
        num_dead = 0
        for victim, expected in steps:
            beside = None
            if victim is not None:
                num_dead += 1

                async def beside(load: Load, rank: int = victim) -> None:
                    await kill_under_way(load, server, rank)

            answers = run_load(server.url, requests_of(cases), beside)
            assert not check_all(cases, answers), f"after the loss of {victim}"
            if victim is not None:
                reason = server.await_recovery(num_dead)["recoveries"][-1]["reason"]
                assert "dense-FFN group" in reason
            assert groups(server) == expected
        dead = [rank for rank, _ in steps if rank is not None]
        for rank in dead:
            server.await_rejoin(rank)
        assert groups(server)[0] == ([0, 1], True), "whoever comes back has its shard again"
        assert not check_all(cases, run_load(server.url, requests_of(cases)))
