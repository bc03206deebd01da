"""All ranks gone at once: the engine keeps the connections and starts ranks behind them."""

import asyncio
import shutil
from pathlib import Path

import pytest
from support.cases import Case, Weights, check_all, requests_of
from support.client import Load, run_load
from support.deployment import deployed, kill


@pytest.mark.parametrize("also_fork_server", [False, True])
def test_no_request_fails_when_all_ranks_are_killed(
    qwen: Weights, mixed: list[Case], also_fork_server: bool
) -> None:
    with deployed(qwen.dir, 3, "--redundant-experts", "16") as server:
        pids = [*server.pids().values(), *([server.fork_server()] if also_fork_server else [])]

        async def beside(load: Load) -> None:
            await load.reached(60)
            kill(*pids)

        answers = run_load(server.url, requests_of(mixed), beside)
        assert not check_all(mixed, answers)
        status = server.await_status(
            lambda s: (
                s["state"] == "serving" and all(e["logical_rank"] is not None for e in s["engines"])
            )
        )
        assert status["recoveries"][0]["outcome"] == "restarted"
        assert [e["incarnation"] for e in status["engines"]] == [2, 2, 2]
        again = run_load(server.url, requests_of(mixed))
        assert not check_all(mixed, again)


def test_when_even_that_fails_every_stream_is_told(
    qwen: Weights, mixed: list[Case], tmp_path: Path
) -> None:
    """The weights are gone when the ranks are to be started anew."""
    model_dir = tmp_path / "model"
    shutil.copytree(qwen.dir, model_dir)
    with deployed(model_dir, 2, "--redundant-experts", "16") as server:
        pids = list(server.pids().values())

        async def beside(load: Load) -> None:
            await load.reached(40)
            for file in model_dir.glob("*.safetensors"):
                file.unlink()
            kill(*pids)
            await asyncio.sleep(0)

        answers = run_load(server.url, requests_of(mixed), beside)
        ended = [a for a in answers if a.error is not None]
        assert ended, "there were streams under way"
        assert all("failed" in str(a.error) for a in ended)
        status = server.await_status(lambda s: s["state"] == "failed")
        assert "restarts in a row within" in status["reason"]
        assert server.get("/health").status_code == 503
        assert server.get("/ready").status_code == 503
