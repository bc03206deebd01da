"""A rank leaves ahead of its death: no step is undone, nothing is lost, no stream waits long."""

import asyncio
import statistics
import time

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, run_load
from support.deployment import Deployment, deployed, with_status

from revivemoe.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def cases(qwen: Weights) -> list[Case]:
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=96)
    return plain_cases(qwen, params, 8, (60, 90))


def drain(server: Deployment, how: str) -> None:
    if how == "isolate":
        server.apply("isolate", id=1)
    else:
        server.apply("report", id=1, level=4, code="80E18005", detail="HBM")


@pytest.mark.parametrize("how", ["isolate", "report"])
def test_a_drained_rank_takes_no_step_with_it(qwen: Weights, cases: list[Case], how: str) -> None:
    flags = "--redundant-experts", "16", "--max-model-len", "512"
    with deployed(qwen.dir, 4, *flags) as server:
        arrivals: list[tuple[float, list[int]]] = []

        async def beside(load: Load) -> None:
            await load.reached(200)
            asked = time.monotonic()
            await asyncio.to_thread(drain, server, how)
            while time.monotonic() < asked + 20 and load._num_open:
                arrivals.append((time.monotonic(), [a.num_tokens for a in load.answers]))
                await asyncio.sleep(0.002)

        answers = run_load(server.url, requests_of(cases), beside)
        assert not check_all(cases, answers)
        status = server.await_recovery()
        (record,) = status["recoveries"]
        assert record["rolled_back"] == 0
        assert record["outcome"] == "recovered"
        assert record["cause"] == ("isolate" if how == "isolate" else "device_fault")
        (dead,) = with_status(status, "dead")
        assert dead["id"] == 1
        assert set(server.per_rank("revivemoe_rank_survivor_refills_total").values()) == {0}
        worst, median = gaps(arrivals)
        print(f"longest gap {worst * 1e3:.0f} ms, median {median * 1e3:.0f} ms")
        assert worst < 1.0, "no stream waits for anything that takes long"
        status = server.await_rejoin(1)
        assert [e["logical_rank"] for e in status["engines"]] == [0, 1, 2, 3]


def gaps(arrivals: list[tuple[float, list[int]]]) -> tuple[float, float]:
    """Longest and median time between tokens of one stream."""
    found = []
    for stream in range(len(arrivals[0][1])):
        last_at, last = arrivals[0][0], arrivals[0][1][stream]
        for at, counts in arrivals:
            if counts[stream] > last:
                found.append(at - last_at)
                last_at, last = at, counts[stream]
    return max(found), statistics.median(found)
