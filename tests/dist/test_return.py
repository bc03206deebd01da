"""Strength comes back by itself: lost ranks, their experts and their roles, without an operator."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from support.cases import Case, Weights, check_all, plain_cases, requests_of
from support.client import Load, Request, run_load
from support.deployment import Deployment, Status, deployed, kill, with_status
from support.memory_limit import CannotLimit, limited

from revivemoe.sampling_params import SamplingParams

BACK_S = 60.0
MOST_LOST = {"error": 2, "hang": 2, "memory": 2, "kill": 4}
"""How many ranks a request may cost that brings down whoever runs it. Of a SIGKILL nobody knows
that a request had a part in it, before two ranks have died under the same one; the kernel's
out-of-memory killer leaves a trace."""
RANK_MIB = 96
"""Beyond what a rank has when it is limited. Much more takes so long, on a busy machine, that it
passes for a hang."""


def whole(status: Status) -> bool:
    return status["state"] == "serving" and all(
        engine["status"] == "healthy" for engine in status["engines"]
    )


def await_whole(server: Deployment) -> Status:
    return server.await_status(whole, BACK_S)


@pytest.fixture(scope="module")
def four(qwen: Weights) -> Iterator[Deployment]:
    """Every expert on three of four ranks: any two may go at once."""
    flags = "--redundant-experts", "32", "--enable-fault-injection", "--max-model-len", "512"
    with deployed(qwen.dir, 4, *flags, auto_rejoin=True) as server:
        yield server


def test_two_lost_at_once_come_back(four: Deployment, mixed: list[Case]) -> None:
    server = four
    pids = server.pids()

    async def beside(load: Load) -> None:
        await load.reached(60)
        kill(pids[1], pids[2])

    answers = run_load(server.url, requests_of(mixed), beside)
    assert not check_all(mixed, answers)
    status = await_whole(server)
    assert [engine["incarnation"] for engine in status["engines"]] == [1, 2, 2, 1]
    assert status["experts"]["missing"] == []
    assert {r["cause"] for r in status["recoveries"]} == {"process_exit", "rejoin"}
    assert status["obligations"] == []
    assert not check_all(mixed, run_load(server.url, requests_of(mixed)))
    stats = server.status()["engines"]
    assert all(engine["last_step"] > 0 for engine in stats), "requests flow to who came back"


@pytest.mark.parametrize("kind", MOST_LOST)
def test_a_poison_request_costs_few_ranks(four: Deployment, mixed: list[Case], kind: str) -> None:
    server, poison = four, unused_tokens(mixed)[list(MOST_LOST).index(kind)]
    await_whole(server)
    with ExitStack() as limits:
        if kind == "memory":
            limits.enter_context(own_memory(server))
        strike(server, mixed, kind, poison)


@contextmanager
def own_memory(server: Deployment) -> Iterator[None]:
    """Every rank's memory limited apart, so that the kernel kills the one that takes too much."""
    try:
        with limited({f"revive-{p}": p for p in server.pids().values()}, RANK_MIB):
            yield
    except CannotLimit as error:
        pytest.skip(str(error))


def strike(server: Deployment, mixed: list[Case], kind: str, poison: int) -> None:
    for engine in server.status()["engines"]:
        server.inject(engine["id"], kind, {"phase": "experts"}, {"prompt_token": poison})
    before = len(server.status()["recoveries"])
    body = {"prompt": [30, poison, 31], "max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    killer = Request("/v1/completions", body, after_tokens=60)
    *answers, ended = run_load(server.url, [*requests_of(mixed), killer])
    assert not check_all(mixed, answers), f"{kind}: every other stream goes on"
    status = await_whole(server)
    lost = [f for r in status["recoveries"][before:] for f in r["faults"]]
    assert 1 <= len(lost) <= MOST_LOST[kind], f"{kind}: {lost}"
    if kind == "memory":
        assert all("SIGKILL" in str(fault) for fault in lost), f"the kernel's: {lost}"
    assert ended.error is not None or kind == "kill", "new ranks are not armed"


def unused_tokens(mixed: list[Case]) -> list[int]:
    used = {t for case in mixed for t in case.request.body.get("prompt", []) if isinstance(t, int)}
    used |= {t for case in mixed for tokens in case.expected for t in tokens}
    return [t for t in range(20, 500) if t not in used]


def test_who_stood_in_for_an_expert_rank_goes_home(qwen: Weights) -> None:
    """Three attention ranks and two expert ranks without replicas: one has to switch its role."""
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=120)
    cases = plain_cases(qwen, params, 8, (24, 40))
    with deployed(qwen.dir, 3, "--expert-ranks", "2", auto_rejoin=True) as server:
        at_first = roles(server.status())
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(60)
            kill(pids[3])

        answers = run_load(server.url, requests_of(cases), beside)
        assert not check_all(cases, answers)
        status = server.await_status(lambda s: whole(s) and roles(s) == at_first, BACK_S)
        assert status["recoveries"][0]["role_switched"] in (0, 1, 2)
        assert status["quality"] == "full"
        assert not check_all(cases, run_load(server.url, requests_of(cases)))


def roles(status: Status) -> dict[int, list[str]]:
    return {engine["id"]: engine["roles"] for engine in status["engines"]}


@pytest.mark.parametrize("kind", ["isolate", "scale_down"])
def test_whom_an_operator_took_out_stays_out(qwen: Weights, kind: str) -> None:
    with deployed(qwen.dir, 2, "--redundant-experts", "16", auto_rejoin=True) as server:
        server.apply(kind, **({"id": 1} if kind == "isolate" else {"ids": [1]}))
        server.await_recovery(1)
        with pytest.raises(AssertionError, match="never came"):
            server.await_status(lambda s: not with_status(s, "dead"), 5.0)
