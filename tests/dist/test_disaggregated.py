"""Attention and experts on ranks of their own: real kills, role switches, and no stream notices."""

import asyncio
from pathlib import Path

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, Status, deployed, kill, with_status

from revivemoe.sampling_params import SamplingParams

EXPERTS, LAYERS = 16, 4
EXPERT_BYTES = 3 * 64 * 32 * 4
"""Gate, up and down of one expert in float32."""
FULL = ("--redundant-experts", str(EXPERTS))
MASK_MEANWHILE = """
[experts]
serve_masked_meanwhile = true
max_missing_fraction = 0.9
"""


def flags(attention: int, experts: int, *more: str) -> tuple[int, ...]:
    return (attention, "--expert-ranks", str(experts), *more)  # type: ignore[return-value]


def long_cases(qwen: Weights, count: int = 6) -> list[Case]:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=120)
    return plain_cases(qwen, params, count, (24, 40))


async def kill_under_way(load: Load, server: Deployment, *ranks: int) -> None:
    """Kill these ranks once every stream has begun, all at once."""
    pids = await asyncio.to_thread(server.pids)
    await load.until(lambda: all(answer.num_tokens > 4 for answer in load.answers))
    kill(*(pids[rank] for rank in ranks))


def kill_in_step(server: Deployment, steps_on: int, *ranks: int) -> None:
    """SIGKILL to each of these as it begins the same step, with every stream in the middle.

    By the ranks' own count: beside five busy ranks, whoever reads the streams may be so late that
    the first token comes when the last has been made.
    """
    step = max(e["last_step"] for e in server.status()["engines"]) + steps_on
    for rank in ranks:
        server.inject_kill(rank, step=step, phase="schedule")


def roles(status: Status) -> dict[int, tuple[int, list[str]]]:
    """Logical rank and roles of every member."""
    return {
        e["id"]: (e["logical_rank"], e["roles"])
        for e in status["engines"]
        if e["logical_rank"] is not None
    }


@pytest.mark.parametrize(
    ("layout", "victims", "members", "backend"),
    [
        ((3, 2), (4,), {0: "attention", 1: "attention", 2: "attention", 3: "expert"}, "gloo"),
        ((3, 2), (1,), {0: "attention", 2: "attention", 3: "expert", 4: "expert"}, "shm"),
        ((2, 3), (0, 3), {1: "attention", 2: "expert", 4: "expert"}, "gloo"),
    ],
)
def test_loss_with_every_expert_twice(
    qwen: Weights,
    layout: tuple[int, int],
    victims: tuple[int, ...],
    members: dict[int, str],
    backend: str,
) -> None:
    cases = long_cases(qwen)
    more = *FULL, "--comm-backend", backend, "--enable-fault-injection"
    with deployed(qwen.dir, *flags(*layout, *more)) as server:
        kill_in_step(server, 30, *victims)
        answers = run_load(server.url, requests_of(cases))
        status = server.await_recovery(len(victims))
        assert not check_all(cases, answers)
        assert roles(status) == {
            rank: (place, [role]) for place, (rank, role) in enumerate(members.items())
        }
        moved = any(victim < layout[0] for victim in victims)
        for figure in ("migrated", "recomputed_tokens"):
            assert (sum(r[figure] for r in status["recoveries"]) > 0) == moved, status["recoveries"]
        assert status["experts"]["missing"] == []
        refills = server.per_rank("revivemoe_rank_survivor_refills_total")
        assert set(refills.values()) == {0}


def test_an_attention_rank_takes_the_place_of_a_lost_expert_rank(qwen: Weights) -> None:
    """In the foreground: nothing else covers the lost experts, and they may not be masked."""
    cases = long_cases(qwen)
    with deployed(qwen.dir, *flags(3, 2)) as server:
        answers = run_load(
            server.url, requests_of(cases), lambda load: kill_under_way(load, server, 3)
        )
        status = server.await_recovery()
        assert not check_all(cases, answers)
        (recovery,) = status["recoveries"]
        donor = recovery["role_switched"]
        assert donor in (0, 1, 2)
        assert recovery["outcome"] == "recovered"
        assert recovery["experts_reloaded"] == EXPERTS * LAYERS // 2
        assert (status["quality"], status["experts"]["missing"]) == ("full", [])
        memory = server.await_per_rank("revivemoe_rank_memory_bytes", {donor, 4})
        assert memory[donor] == memory[4] == EXPERT_BYTES * EXPERTS * LAYERS // 2
        attention = [rank for rank in (0, 1, 2) if rank != donor]
        assert roles(status) == {
            attention[0]: (0, ["attention"]),
            attention[1]: (1, ["attention"]),
            donor: (2, ["expert"]),
            4: (3, ["expert"]),
        }
        assert not check_all(cases[:2], run_load(server.url, requests_of(cases[:2])))
        again = run_load(
            server.url, requests_of(cases), lambda load: kill_under_way(load, server, donor)
        )
        assert not check_all(cases, again), "the one that has switched dies, too"
        status = server.await_recovery(2)
        assert status["recoveries"][-1]["role_switched"] in attention
        (left,) = [rank for rank, (_, held) in roles(status).items() if held == ["attention"]]
        assert "last attention rank" in server.refused("role_switch", id=left)


def test_a_switch_in_the_background(qwen: Weights, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(MASK_MEANWHILE)
    cases = long_cases(qwen)
    with deployed(qwen.dir, *flags(3, 2, "--recovery-policy", str(policy))) as server:
        answers = run_load(
            server.url, requests_of(cases), lambda load: kill_under_way(load, server, 4)
        )
        assert all(answer.error is None for answer in answers)
        assert all(len(answer.tokens[0]) == 120 for answer in answers)
        status = server.await_status(lambda s: len(s["recoveries"]) == 2)
        first, second = status["recoveries"]
        assert first["experts_masked"] == EXPERTS * LAYERS // 2
        assert second["cause"] == "role_switch"
        donor = second["role_switched"]
        assert donor == first["role_switched"]
        assert second["rolled_back"] == 0
        assert (status["quality"], status["experts"]["missing"]) == ("full", [])
        assert roles(status)[donor][1] == ["expert"]
        assert not check_all(cases[:2], run_load(server.url, requests_of(cases[:2])))


def test_a_switch_on_command_goes_unnoticed(qwen: Weights) -> None:
    """It brings the replicas back that were lost with an expert rank."""
    cases = long_cases(qwen)
    with deployed(qwen.dir, *flags(3, 2, *FULL)) as server:
        kill(server.pids()[3])
        status = server.await_recovery()
        assert status["experts"]["uncovered_by_one_more_fault"] == EXPERTS * LAYERS
        assert "no attention role" in server.refused("role_switch", id=4)

        async def switch(load: Load) -> None:
            await load.until(lambda: all(answer.num_tokens > 8 for answer in load.answers))
            await asyncio.to_thread(lambda: server.apply("role_switch", id=2))

        answers = run_load(server.url, requests_of(cases), switch)
        assert not check_all(cases, answers)
        status = server.await_status(lambda s: len(s["recoveries"]) == 3)
        assert [r["rolled_back"] for r in status["recoveries"][1:]] == [0, 0]
        assert status["recoveries"][-1]["role_switched"] == 2
        assert status["experts"]["uncovered_by_one_more_fault"] == 0
        assert roles(status)[2] == (2, ["expert"])
        assert not with_status(status, "unhealthy")
        assert "no expert is missing" in server.refused("role_switch", id=1)
        server.await_rejoin(3)
        assert not check_all(cases[:2], run_load(server.url, requests_of(cases[:2])))


def test_where_every_rank_holds_experts_none_can_switch(qwen: Weights) -> None:
    with deployed(qwen.dir, 2) as server:
        assert "--expert-ranks" in server.refused("role_switch", id=1)
