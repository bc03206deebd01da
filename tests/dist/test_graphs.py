"""Graph mode through recoveries: the tokens of eager mode, and nothing compiled anew."""

import re
import shutil
from collections.abc import Iterator

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, Status, deployed, kill

from revivemoe.config import cache_folders, compilers
from revivemoe.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, compilers())), reason="no C++ compiler: graphs cannot be built"
)

CACHE = str(cache_folders()[0] / "graphs-of-tests")
"""As of the tests in one process, which come first: there is nothing to be compiled any more."""


def whole(status: Status) -> bool:
    return status["state"] == "serving" and all(e["status"] == "healthy" for e in status["engines"])


def recompiled(server: Deployment) -> int:
    """By a whole instance, all of whose attention ranks have graphs."""
    status = server.await_status(whole, 90.0)
    for engine in status["engines"]:
        wanted = r"\d+ in .*" if "attention" in engine["roles"] else r"none: no attention|"
        assert re.fullmatch(wanted, engine["graphs"]), engine
    assert {r["outcome"] for r in status["recoveries"]} <= {"recovered", "restarted"}
    in_records: int = sum(r["recompiled"] for r in status["recoveries"])
    return in_records + sum(int(e["recompiled"]) for e in status["engines"])


@pytest.fixture(scope="module")
def four(qwen: Weights) -> Iterator[Deployment]:
    """Every expert on three of four ranks: any two may go at once."""
    flags = "--redundant-experts", "32", "--enable-fault-injection", "-O", "1"
    with deployed(qwen.dir, 4, *flags, "--compile-cache", CACHE, auto_rejoin=True) as server:
        yield server


def test_two_ranks_lost_and_back(four: Deployment, mixed: list[Case]) -> None:
    server = four
    assert recompiled(server) == 0
    pids = server.pids()

    async def beside(load: Load) -> None:
        await load.reached(60)
        kill(pids[1], pids[2])

    assert not check_all(mixed, run_load(server.url, requests_of(mixed), beside))
    assert recompiled(server) == 0
    assert not check_all(mixed, run_load(server.url, requests_of(mixed)))
    assert recompiled(server) == 0
    assert [e["incarnation"] for e in server.status()["engines"]] == [1, 2, 2, 1]


POINTS = [
    *(("kill", phase) for phase in ("schedule", "attention", "dispatch", "experts", "combine")),
    ("kill", "sample"), ("kill", "commit"), ("error", "attention"), ("error", "experts"),
    ("nan", "attention"), ("nan", "experts"), ("nan", "combine"),
    ("hang", "attention"), ("hang", "dispatch"), ("hang", "experts"),
]  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("point", POINTS, ids="-".join)
def test_faults_within_a_graph(four: Deployment, mixed: list[Case], point: tuple[str, str]) -> None:
    """Phases are told from behind the operators: faults strike there, and are seen, as ever. Each
    time another rank: the pauses before one is started again grow, and one whose numbers break
    twice is not started again.
    """
    server, (kind, phase) = four, point
    victim = 1 + POINTS.index(point) % 3
    assert recompiled(server) == 0
    before = len(server.status()["recoveries"])

    async def beside(load: Load) -> None:
        await load.reached(60)
        server.inject(victim, kind, {"phase": phase})

    assert not check_all(mixed, run_load(server.url, requests_of(mixed), beside))
    assert len(server.status()["recoveries"]) > before, "it has struck"
    assert recompiled(server) == 0


@pytest.mark.matrix
def test_an_expert_rank_lost_a_role_switched_and_back(qwen: Weights) -> None:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=120)
    cases = plain_cases(qwen, params, 8, (24, 40))
    flags = "--expert-ranks", "2", "-O", "1", "--compile-cache", CACHE
    with deployed(qwen.dir, 3, *flags, auto_rejoin=True) as server:
        assert recompiled(server) == 0
        at_first = [e["roles"] for e in server.status()["engines"]]
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(60)
            kill(pids[3])

        assert not check_all(cases, run_load(server.url, requests_of(cases), beside))
        server.await_status(lambda s: [e["roles"] for e in s["engines"]] == at_first, 90.0)
        assert recompiled(server) == 0
        assert not check_all(cases, run_load(server.url, requests_of(cases)))
        assert recompiled(server) == 0
