"""Every kind of fault at every point of a step: no stream notices, and the instance says the truth.

One deployment takes one fault after the other; whoever was lost rejoins before the next. The full
matrix runs by `make test-matrix`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cases import Case, Weights, check_all, requests_of
from support.client import run_load
from support.deployment import Deployment, Status, deployed, with_status
from support.matrix import LAYOUTS, Cell, Layout, cells_of, part

STEPS_IN = 12
"""Steps of the load before the fault."""
POLICY = """
[limits]
max_recoveries = 10000
max_restarts = 10000
[detection]
slow_after_s = 0.5
repeat_window_s = 0.01
"""


@pytest.fixture(scope="module")
def server(
    qwen: Weights, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text(POLICY)
    with deployed_for_matrix(qwen.dir, request.param, policy) as deployment:
        yield deployment


def deployed_for_matrix(model_dir: Path, layout: Layout, policy: Path):  # type: ignore[no-untyped-def]
    return deployed(
        model_dir, layout.attention, "--expert-ranks", str(layout.experts),
        "--redundant-experts", "16", "--comm-backend", layout.backend,
        "--enable-fault-injection", "--recovery-policy", str(policy), "--max-model-len", "512",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cells of a transport belong to the deployment over it."""
    if "cell" in metafunc.fixturenames:
        choose = cells_of if metafunc.function.__name__ == "test_matrix" else part
        pairs = [(layout, cell) for layout in LAYOUTS for cell in choose(layout)]
        metafunc.parametrize(
            ("server", "cell"),
            pairs,
            indirect=["server"],
            ids=[f"{layout.name}-{cell.name}" for layout, cell in pairs],
            scope="module",
        )


@pytest.mark.matrix
def test_matrix(server: Deployment, mixed: list[Case], chaos_seed: int, cell: Cell) -> None:
    one_fault(server, mixed, chaos_seed, cell)


def test_part_of_the_matrix(
    server: Deployment, mixed: list[Case], chaos_seed: int, cell: Cell
) -> None:
    one_fault(server, mixed, chaos_seed, cell)


def one_fault(server: Deployment, mixed: list[Case], chaos_seed: int, cell: Cell) -> None:
    draw = random.Random(chaos_seed)
    victim, layer = draw.choice(cell.victims), draw.randrange(4)
    told = f"seed {chaos_seed}: rank {victim}, layer {layer}"
    before = server.await_status(whole)
    refills = server.per_rank("revivemoe_rank_survivor_refills_total")
    if cell.idle:
        server.inject(victim, cell.kind, {}, cell.params)
        if cell.cause is not None and cell.kind != "comm":
            await_recoveries(server, before, 1)
    else:
        server.inject(victim, cell.kind, point(before, cell, layer), cell.params)
    answers = run_load(server.url, requests_of(mixed))
    assert not check_all(mixed, answers), told
    after = server.await_idle()
    if cell.cause is not None:
        after = await_recoveries(server, before, 1)
    assert_told(before, after, cell, victim, told)
    survivors = {e["id"] for e in with_status(after, "healthy")}
    now = server.per_rank("revivemoe_rank_survivor_refills_total")
    assert all(now[r] == refills.get(r, 0) for r in survivors), told
    mend(server, victim, cell)


def point(before: Status, cell: Cell, layer: int) -> dict[str, int | str]:
    step = max(e["last_step"] for e in before["engines"]) + STEPS_IN
    at: dict[str, int | str] = {"step": step}
    if cell.phase is not None:
        at["phase"] = cell.phase
        if cell.phase in ("attention", "dispatch", "experts", "combine"):
            at["layer"] = layer
    return at


def whole(status: Status) -> bool:
    members = [e for e in status["engines"] if e["logical_rank"] is not None]
    return status["state"] == "serving" and len(members) == status["total_engines"]


def recoveries(status: Status, before: Status) -> list[Status]:
    """Since then. (Only so many are kept in all.)"""
    new = [r for r in status["recoveries"] if r["epoch"] > before["epoch"]]
    return [r for r in new if r["cause"] != "rejoin"]


def await_recoveries(server: Deployment, before: Status, count: int) -> Status:
    return server.await_status(
        lambda s: s["state"] == "serving" and len(recoveries(s, before)) >= count
    )


def assert_told(before: Status, after: Status, cell: Cell, victim: int, told: str) -> None:
    """What the status must say."""
    new = recoveries(after, before)
    causes = [r["cause"] for r in new]
    assert causes == ([] if cell.cause is None else [cell.cause]), f"{told}: {new}"
    dead = [e["id"] for e in with_status(after, "dead")]
    assert dead == ([victim] if cell.lost else []), told
    assert after["quality"] == "full"
    for recovery in new:
        assert recovery["outcome"] == "recovered"
        accused = [f["id"] for f in recovery["faults"]]
        assert accused == ([victim] if cell.lost else []), f"{told}: {recovery}"
    view = next(e for e in after["engines"] if e["id"] == victim)
    if cell.kind == "slow":
        server_says = view["status"]
        assert server_says in ("suspect", "healthy")
    if cell.kind == "device_fault" and cell.params["level"] == 2:
        assert view["status"] == "unhealthy"
        assert view["fault_info"]["level"] == 2
    if cell.kind == "device_fault" and cell.params["level"] == 4:
        assert new[0]["rolled_back"] == 0, "a drain undoes no step"


def mend(server: Deployment, victim: int, cell: Cell) -> None:
    """Make the instance whole again for the next fault."""
    if cell.kind == "slow":
        server.apply("isolate", id=victim)
        server.await_recovery()
    if cell.kind == "device_fault" and not cell.lost:
        server.apply("report", id=victim, level=0, code="mended")
    for engine in with_status(server.status(), "dead"):
        server.await_rejoin(engine["id"])
    server.await_status(whole)
