"""Who is accused, and who is not: stalls of the engine, silent ranks, suspects that do not die."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.cases import Case, Weights, check_all, requests_of
from support.client import Load, run_load
from support.deployment import deployed, kill, with_status
from support.warm import zygote

from revivemoe.bench import plain_http
from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.checkpoint.make import make_model
from revivemoe.cli.serve_run import load_tokenizer
from revivemoe.cluster import launcher
from revivemoe.config import EngineConfig, resolve
from revivemoe.ids import RankId
from revivemoe.recovery.policy import Policy
from revivemoe.sampling_params import SamplingParams
from revivemoe.serving.instance import Instance
from revivemoe.streams import Delta, Submission

ONCE = "--redundant-experts", "16"


def test_a_stall_of_the_engine_condemns_nobody(qwen: Weights, mixed: list[Case]) -> None:
    with deployed(qwen.dir, 3, *ONCE) as server:

        async def beside(load: Load) -> None:
            await load.reached(60)
            os.kill(server.pid, signal.SIGSTOP)
            await asyncio.sleep(3)
            os.kill(server.pid, signal.SIGCONT)

        answers = run_load(server.url, requests_of(mixed), beside)
        assert not check_all(mixed, answers)
        time.sleep(1.5)
        status = server.status()
        assert status["recoveries"] == []
        assert len(with_status(status, "healthy")) == 3


def test_the_death_of_the_fork_server_condemns_nobody(qwen: Weights, mixed: list[Case]) -> None:
    with deployed(qwen.dir, 3, *ONCE) as server:
        fork_server = server.fork_server()
        pids = server.pids()

        async def beside(load: Load) -> None:
            await load.reached(40)
            kill(fork_server)
            await load.reached(120)
            assert (await asyncio.to_thread(server.status))["recoveries"] == []
            kill(pids[1])

        answers = run_load(server.url, requests_of(mixed), beside)
        assert not check_all(mixed, answers)
        (recovery,) = server.await_recovery()["recoveries"]
        assert [f["id"] for f in recovery["faults"]] == [1]
        server.await_rejoin(1, timeout_s=60)
        answers = run_load(server.url, requests_of(mixed))
        assert not check_all(mixed, answers), "a new fork server has started the rank"


def test_a_rank_that_stops_while_nobody_works_is_found(qwen: Weights) -> None:
    with deployed(qwen.dir, 3, *ONCE) as server:
        pid = server.pids()[2]
        time.sleep(0.5)
        stopped = server.kill_pid(pid, signal.SIGSTOP)
        server.await_recovery()
        assert time.monotonic() - stopped < 4.0
        (recovery,) = server.status()["recoveries"]
        assert recovery["cause"] == "heartbeat"


def test_a_link_that_fails_twice_costs_one_of_its_ends(
    qwen: Weights, mixed: list[Case], tmp_path: Path
) -> None:
    """What counts as a repeat is wide here: threads of gloo may spin on the cut link's sockets for
    half a minute, and then the second failure is long in coming.
    """
    policy = tmp_path / "policy.toml"
    policy.write_text("[detection]\nrepeat_window_s = 100.0\n")
    flags = *ONCE, "--comm-backend", "gloo", "--recovery-policy", str(policy)
    with deployed(qwen.dir, 4, *flags, "--enable-fault-injection") as server:
        for count in (1, 2):
            step = max(e["last_step"] for e in server.status()["engines"]) + 10
            server.inject(1, "comm", {"step": step, "phase": "dispatch"}, {"peer": 3})
            answers = run_load(server.url, requests_of(mixed))
            assert not check_all(mixed, answers)
            status = server.await_status(
                lambda s: s["state"] == "serving" and len(s["recoveries"]) == count  # noqa: B023
            )
            assert status["recoveries"][-1]["cause"] == "communication"
        assert status["recoveries"][0]["faults"] == []
        assert [e["id"] for e in with_status(status, "dead")] == [3]


# ---- suspects that cannot be killed ---------------------------------------------------------


async def read(
    instance: Instance, case: Case, after: Callable[[], Awaitable[None]] | None = None
) -> None:
    """One stream of an instance in this process; `after` its eighth token."""
    body = case.request.body
    params = SamplingParams(
        seed=body["seed"], temperature=body["temperature"], max_tokens=body["max_tokens"]
    )
    got: list[int] = []
    submission = Submission(case.name, (tuple(body["prompt"]),), 1, params)
    async for event in await instance.submit(submission):
        assert isinstance(event, Delta), event
        got.extend(event.token_ids)
        if after is not None and len(got) == 8:
            await after()
    assert got == case.expected[0], case.name


@pytest.fixture
def warm_fork_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of instances in this process."""
    monkeypatch.setattr(launcher, "start_process", zygote().start_fork_server)


@pytest.mark.usefixtures("warm_fork_servers")
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_survivors_do_not_wait_for_a_corpse(qwen: Weights, mixed: list[Case], backend: str) -> None:
    """The suspect is stopped and nobody kills it: they go on as if somebody had."""
    stalls = {may_kill: _stall(qwen.dir, mixed, backend, may_kill) for may_kill in (True, False)}
    assert stalls[False] < stalls[True] + 1.0, stalls


def _stall(model_dir: Path, mixed: list[Case], backend: str, may_kill: bool) -> float:
    return asyncio.run(_stopped_rank(model_dir, mixed, backend, may_kill))


async def _stopped_rank(model_dir: Path, mixed: list[Case], backend: str, may_kill: bool) -> float:
    info = inspect_checkpoint(model_dir)
    asked = EngineConfig(
        model_dir, data_parallel_size=3, redundant_experts=16, comm_backend=backend,
        device="cpu", dtype="float32", max_model_len=512,
        policy=Policy(auto_rejoin=False, restore_redundancy=False),
    )  # fmt: skip
    async with Instance(resolve(asked, info), info, load_tokenizer(model_dir)) as instance:
        await asyncio.wait_for(instance.serving.wait(), 60)
        cluster: Any = instance._cluster
        pid = cluster.pid(RankId(1))
        if not may_kill:
            cluster.kill = lambda rank: None

        async def stop() -> None:
            if not instance.engine.epochs.records:
                os.kill(pid, signal.SIGSTOP)

        cases = [c for c in mixed if c.name == "greedy 0"]
        await asyncio.gather(*(read(instance, c, stop) for c in cases * 3))
        (record,) = instance.engine.epochs.records
        assert [f.kind for f in record.faults] == ["heartbeat"], record
        if not may_kill:
            os.kill(pid, signal.SIGCONT)  # the zombie finds that its epoch is over
            await asyncio.gather(*(read(instance, c) for c in cases * 3))
            assert psutil.pid_exists(pid)
        assert len(instance.engine.epochs.records) == 1
        assert record.stall_s is not None
        return record.stall_s


# ---- work that takes long is no fault -------------------------------------------------------


@pytest.fixture
def quick_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the size of weights counts: one block of noise, over and over."""
    block = torch.randn(1 << 20)

    def randn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.usefixtures("quick_noise")
def test_a_long_prefill_on_big_layers_raises_no_suspicion(tmp_path: Path) -> None:
    """About a billion parameters, 800 tokens at once, four ranks on the cores there are."""
    model_dir = tmp_path / "medium"
    make_model(model_dir, "qwen3_moe", "medium", 0, "bfloat16")
    flags = ["--dtype", "bfloat16", "--max-model-len", "1536", "--max-num-batched-tokens", "1024"]
    with deployed(model_dir, 4, *flags) as server:
        seen: set[str] = set()
        body = {"model": "medium", "prompt": [7 + i % 90 for i in range(800)], "max_tokens": 4}

        async def ask() -> None:
            async with plain_http.async_client(timeout=110) as client:
                post = client.post(f"{server.url}/v1/completions", json=body)
                asking = asyncio.create_task(post)
                while not asking.done():
                    status = await asyncio.to_thread(server.status)
                    seen.update(e["status"] for e in status["engines"])
                    await asyncio.sleep(0.2)
                assert asking.result().status_code == 200

        asyncio.run(ask())
        assert seen == {"healthy"}
        assert server.status()["recoveries"] == []
