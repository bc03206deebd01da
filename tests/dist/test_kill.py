"""SIGKILL of ranks under load: every stream goes on to exactly the tokens it would have had."""

import asyncio
import random

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, Status, deployed, kill, with_status
from support.faults import killer, unlike

from revivemoe.epochs.record import PHASES
from revivemoe.sampling_params import SamplingParams

EXPERTS, LAYERS = 16, 4
ONCE, TWICE = ("--redundant-experts", str(EXPERTS)), ("--redundant-experts", str(2 * EXPERTS))


@pytest.mark.parametrize("victim", range(2))
def test_no_stream_notices_the_loss_of_a_rank(
    qwen: Weights, mixed: list[Case], chaos_seed: int, victim: int
) -> None:
    """Even victims die after the same load ran calmly (warm prefix cache), odd ones before it."""
    draw = random.Random(chaos_seed)
    total = sum(len(tokens) for case in mixed for tokens in case.expected)
    moment = victim, draw.randrange(1, total * 3 // 5)
    told = f"seed {chaos_seed}: rank and token {moment}"
    with deployed(qwen.dir, 4, *ONCE, "--max-num-batched-tokens", "64") as server:
        requests = requests_of(mixed)
        calm = run_load(server.url, requests) if victim % 2 == 0 else []
        fault = run_load(server.url, requests, killer(server, moment))
        status = server.await_idle()
        calm = calm or run_load(server.url, requests)
        assert not check_all(mixed, calm), told
        assert not check_all(mixed, fault), told
        assert not unlike(calm, fault, mixed), told
        assert_status_tells(status, victim)
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}, told
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        again = run_load(server.url, requests)
        assert not unlike(calm, again, mixed), "new requests after the recovery"


def assert_status_tells(status: Status, victim: int) -> None:
    """What the document must say after one rank was lost and all its experts had replicas."""
    assert (status["state"], status["epoch"], status["quality"]) == ("serving", 2, "full")
    (dead,) = with_status(status, "dead")
    assert (dead["id"], dead["roles"], dead["logical_rank"]) == (victim, [], None)
    assert dead["fault_info"]["kind"] == "process_exit"
    survivors = with_status(status, "healthy")
    assert [e["logical_rank"] for e in survivors] == [0, 1, 2]
    assert all(e["roles"] == ["attention", "expert"] for e in survivors)
    assert status["experts"]["missing"] == []
    (recovery,) = status["recoveries"]
    assert (recovery["epoch"], recovery["cause"]) == (2, "process_exit")
    assert recovery["outcome"] == "recovered"
    assert [fault["id"] for fault in recovery["faults"]] == [victim]
    assert set(recovery["phases"]) == set(PHASES)
    assert all(seconds >= 0 for seconds in recovery["phases"].values())
    assert 0 <= recovery["detect_s"] < 1
    assert 0 < recovery["stall_s"] < 10 if recovery["migrated"] else recovery["stall_s"] != 0
    assert recovery["experts_dropped"] == 2 * EXPERTS * LAYERS // 4
    assert (recovery["experts_masked"], recovery["recompiled"]) == (0, 0)


def test_every_sequence_of_the_lost_rank_moves_and_no_other(qwen: Weights) -> None:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=96)
    cases = plain_cases(qwen, params, 10, (24, 40))
    homes: list[int] = []
    with deployed(qwen.dir, 4, *ONCE) as server:

        async def beside(load: Load) -> None:
            await load.until(lambda: all(answer.num_tokens for answer in load.answers))
            running = [e["running"] for e in (await asyncio.to_thread(all_reported, server, 10))]
            homes.extend(running)
            await asyncio.to_thread(lambda: kill(server.pids()[1]))

        answers = run_load(server.url, requests_of(cases), beside)
        (recovery,) = server.await_recovery()["recoveries"]
        assert not check_all(cases, answers)
        assert recovery["migrated"] == homes[1] > 0
        assert recovery["recomputed_tokens"] > homes[1] * 24


def all_reported(server: Deployment, num_running: int) -> list[Status]:
    """The ranks, once their heartbeats tell of so many running sequences."""
    status = server.await_status(
        lambda s: sum(e["running"] for e in s["engines"]) == num_running, timeout_s=5
    )
    engines: list[Status] = status["engines"]
    return engines


def test_ranks_lost_one_after_the_other(qwen: Weights, mixed: list[Case], chaos_seed: int) -> None:
    """The first while nobody has work, two more under load."""
    draw = random.Random(chaos_seed)
    total = sum(len(tokens) for case in mixed for tokens in case.expected)
    idle, first, second = draw.sample(range(4), 3)
    moments = (first, draw.randrange(1, total // 3)), (second, draw.randrange(total // 2, total))
    told = f"seed {chaos_seed}: ranks {idle}, {first}, {second}"
    with deployed(qwen.dir, 4, "--redundant-experts", str(3 * EXPERTS)) as server:
        requests = requests_of(mixed)
        calm = run_load(server.url, requests)
        server.await_idle()
        kill(server.pids()[idle])
        (recovery,) = server.await_recovery()["recoveries"]
        assert (recovery["stall_s"], recovery["migrated"]) == (None, 0), told
        fault = run_load(server.url, requests, killer(server, *moments))
        assert not check_all(mixed, fault), told
        assert not unlike(calm, fault, mixed), told
        status = server.await_idle()
        assert [r["outcome"] for r in status["recoveries"]] == ["recovered"] * 3, told
        assert [e["logical_rank"] for e in with_status(status, "healthy")] == [0], told
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}, told
