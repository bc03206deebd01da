"""More than one fault: at once, during a recovery, one after another; and a request that kills."""

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, Request, run_load
from support.deployment import Deployment, deployed, kill, with_status

from revivemoe.sampling_params import SamplingParams

POLICY = "[limits]\nmax_recoveries = 1000\nmax_restarts = 1000\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module")
def server(qwen: Weights, policy: Path) -> Iterator[Deployment]:
    """Every expert on three of four ranks: any two may go."""
    flags = "--redundant-experts", "32", "--recovery-policy", str(policy), "--max-model-len", "512"
    with deployed(qwen.dir, 4, *flags, "--enable-fault-injection") as deployment:
        yield deployment


def mend(server: Deployment) -> None:
    for engine in with_status(server.status(), "dead"):
        server.await_rejoin(engine["id"])


@pytest.mark.parametrize(
    ("delay_s", "second"),
    [
        (0.0, signal.SIGKILL),
        (0.0, signal.SIGSTOP),
        (0.005, signal.SIGKILL),
        (0.02, signal.SIGKILL),
        (0.05, signal.SIGKILL),
        (0.1, signal.SIGKILL),
    ],
)
def test_a_second_fault_at_once_or_soon_after(
    server: Deployment, mixed: list[Case], delay_s: float, second: signal.Signals
) -> None:
    """Soon after: while fencing, while entering the domain, or in the first steps of the epoch."""
    pids = server.pids()

    async def beside(load: Load) -> None:
        await load.reached(80)
        server.kill_pid(pids[1])
        if delay_s:
            await asyncio.sleep(delay_s)
        server.kill_pid(pids[3], second)

    answers = run_load(server.url, requests_of(mixed), beside)
    assert not check_all(mixed, answers)
    status = server.await_recovery(2)
    assert {e["id"] for e in with_status(status, "dead")} == {1, 3}
    mend(server)


def test_at_random_moments_of_a_recovery(
    server: Deployment, mixed: list[Case], chaos_seed: int
) -> None:
    draw = random.Random(chaos_seed)
    for _ in range(3):
        first, second = draw.sample(range(4), 2)
        pause_s, pids = draw.uniform(0, 0.06), server.pids()

        async def beside(load: Load) -> None:
            await load.reached(draw.randrange(20, 200))
            kill(pids[first])  # noqa: B023
            await asyncio.sleep(pause_s)  # noqa: B023
            kill(pids[second])  # noqa: B023

        answers = run_load(server.url, requests_of(mixed), beside)
        assert not check_all(mixed, answers), f"seed {chaos_seed}"
        server.await_recovery(2)
        mend(server)


def test_one_after_another_down_to_the_last(qwen: Weights, mixed: list[Case], policy: Path) -> None:
    flags = "--redundant-experts", "48", "--recovery-policy", str(policy)
    with deployed(qwen.dir, 4, *flags) as server:
        pids = server.pids()

        async def beside(load: Load) -> None:
            for count, rank in enumerate((3, 0, 2), 1):
                await load.reached(50 * count)
                kill(pids[rank])
                await asyncio.to_thread(server.await_recovery, count)

        answers = run_load(server.url, requests_of(mixed), beside)
        assert not check_all(mixed, answers)
        assert with_status(server.status(), "healthy")[0]["logical_rank"] == 0


def test_more_than_the_policy_allows_stops_with_the_reason(
    qwen: Weights, mixed: list[Case], tmp_path: Path
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[limits]\nmax_recoveries = 0\nmax_restarts = 0\n")
    flags = "--redundant-experts", "32", "--recovery-policy", str(path)
    with deployed(qwen.dir, 3, *flags) as server:
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(40)
            kill(pids[1])

        began, limit = time.monotonic(), "the policy's limit is 0"
        answers = run_load(server.url, requests_of(mixed), beside)
        assert time.monotonic() - began < 60
        assert any(a.error is not None for a in answers)
        assert all(a.error is None or limit in a.error for a in answers)
        assert limit in server.await_status(lambda s: s["state"] == "failed")["reason"]


def test_without_room_on_the_survivors_everything_queues_and_finishes(qwen: Weights) -> None:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=64)
    cases = plain_cases(qwen, params, 12, (40, 56))
    flags = "--redundant-experts", "16", "--num-kv-blocks", "20", "--max-model-len", "256"
    with deployed(qwen.dir, 3, *flags) as server:
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(120)
            kill(pids[1])

        answers = run_load(server.url, requests_of(cases), beside)
        assert not check_all(cases, answers)


def test_a_request_that_kills_whoever_runs_it_ends_alone(
    server: Deployment, mixed: list[Case]
) -> None:
    used = {t for case in mixed for t in case.request.body.get("prompt", []) if isinstance(t, int)}
    used |= {t for case in mixed for tokens in case.expected for t in tokens}
    poison = next(t for t in range(20, 500) if t not in used)
    for rank in range(4):
        server.inject(rank, "error", {"phase": "experts"}, {"prompt_token": poison})
    before = len(server.status()["recoveries"])
    body = {"prompt": [30, poison, 31], "max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    killer = Request("/v1/completions", body, after_tokens=60)
    *answers, ended = run_load(server.url, [*requests_of(mixed), killer])
    assert not check_all(mixed, answers), "every other stream goes on"
    assert ended.error is not None
    assert "running at two faults" in ended.error
    status = server.await_status(lambda s: s["state"] == "serving")
    lost = [f for r in status["recoveries"][before:] for f in r["faults"]]
    assert len(lost) == 2
    mend(server)
