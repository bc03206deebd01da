"""A loss under load, with as much redundancy as there is: drop, reload, mask, restart."""

import asyncio
from collections.abc import Sequence

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, Status, deployed, kill

from revivemoe.sampling_params import SamplingParams

EXPERTS, LAYERS, RANKS = 16, 4, 4
VICTIM = 2


@pytest.fixture(scope="module")
def cases(qwen: Weights) -> list[Case]:
    return plain_cases(qwen, SamplingParams(seed=1, temperature=0.0, max_tokens=48), 8, (20, 33))


def lose_one(server: Deployment, cases: Sequence[Case]) -> tuple[list[str], Status]:
    """Kill a rank under load. Returns what is wrong with the streams, and the status then."""
    pids = server.pids()

    async def beside(load: Load) -> None:
        await load.reached(60)
        kill(pids[VICTIM])
        await asyncio.sleep(0)

    answers = run_load(server.url, requests_of(cases), beside)
    status = server.await_status(lambda s: s["state"] == "serving" and bool(s["recoveries"]))
    return check_all(cases, answers), status


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--redundant-experts", "16"), "dropped"),
        (("--redundant-experts", "4"), "reloaded"),
        (("--redundant-experts", "2", "--spare-expert-slots", "1"), "reloaded"),
        (("--spare-expert-slots", "2"), "reloaded"),
        (("--spare-expert-slots", "2", "--expert-host-cache"), "reloaded"),
        ((), "restarted"),
    ],
    ids=["100%", "25%", "12.5%", "0-spare", "0-spare-host-cache", "0"],
)
def test_kills_recover_by_what_the_redundancy_allows(
    qwen: Weights, cases: list[Case], flags: tuple[str, ...], what: str
) -> None:
    with deployed(qwen.dir, RANKS, *flags) as server:
        wrong, status = lose_one(server, cases)
        assert not wrong
        assert (status["quality"], status["experts"]["missing"]) == ("full", [])
        first = status["recoveries"][0]
        assert first["outcome"] == ("restarted" if what == "restarted" else "recovered")
        assert (first["experts_reloaded"] > 0) == (what == "reloaded"), first
        assert first["experts_dropped"] > 0 or what != "dropped"
        assert first["restarted"] == ([VICTIM] if what == "restarted" else [])
        again = run_load(server.url, requests_of(cases))
        assert not check_all(cases, again), "exact again whenever the quality is full"
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}


def test_masked_meanwhile_then_whole_again(
    qwen: Weights, cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Degraded at once, full again without a pause; nothing computed under the mask is shared."""
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text("[experts]\nmax_missing_fraction = 0.5\nserve_masked_meanwhile = true\n")
    flags = "--spare-expert-slots", "2", "--recovery-policy", str(policy)
    with deployed(qwen.dir, RANKS, *flags) as server:
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(60)
            kill(pids[VICTIM])

        answers = run_load(server.url, requests_of(cases), beside)
        assert all(answer.error is None and answer.num_ends == 1 for answer in answers)
        status = server.await_status(lambda s: s["quality"] == "full" and len(s["recoveries"]) >= 2)
        lost, restored = status["recoveries"][:2]
        assert lost["experts_masked"] == EXPERTS // RANKS * LAYERS
        assert restored["cause"] == "restore_experts"
        assert restored["rolled_back"] == 0
        assert status["experts"]["missing"] == []
        again = run_load(server.url, requests_of(cases))
        assert not check_all(cases, again), "the same prompts, some computed while masked"
        assert all(answer.quality is None for answer in again)


def test_missing_experts_are_restored_on_request_when_a_rank_is_back(
    qwen: Weights, cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text('[experts]\nmax_missing_fraction = 0.5\nrepair = ["mask"]\n')
    with deployed(qwen.dir, RANKS, "--recovery-policy", str(policy)) as server:
        kill(server.pids()[VICTIM])
        status = server.await_recovery()
        assert status["quality"] == "degraded"
        assert len(status["experts"]["missing"]) == EXPERTS // RANKS * LAYERS
        assert "no rank has a spare slot" in server.refused("restore_experts")
        server.await_rejoin(VICTIM)
        status = server.await_status(lambda s: s["quality"] == "full")
        assert [e["logical_rank"] for e in status["engines"]] == [0, 1, 2, 3]
        answers = run_load(server.url, requests_of(cases))
        assert not check_all(cases, answers)
