"""Every family on CUDA over the staged transport, two ranks on one GPU, and a real kill."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.screen import Screened, screen
from transformers import AutoModelForCausalLM

from revivemoe.bench.faultrun import run_with_kill
from revivemoe.bench.loadgen import StreamResult, stream_all
from revivemoe.bench.server_process import ServerProcess
from revivemoe.checkpoint import ARCHS, make_model
from revivemoe.sampling_params import SamplingParams

GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=48)
FLAGS = ["--device", "cuda", "--dtype", "float32", "--data-parallel-size", "2",
         "--redundant-experts", "16", "--max-model-len", "1024", "--comm-backend", "gloo",
         "--max-num-batched-tokens", "64", "--num-kv-blocks", "256"]  # fmt: skip


def _screened(
    folder: Path, arch: str, count: int, lens: tuple[int, ...]
) -> tuple[Path, list[Screened]]:
    directory = folder / arch
    make_model(directory, arch, "tiny", 0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return directory, screen(model, GREEDY, count, prompt_lens=lens)


def _bodies(directory: Path, prompts: list[Screened]) -> list[dict[str, Any]]:
    return [
        {"model": directory.name, "prompt": list(p.prompt_ids), "max_tokens": GREEDY.max_tokens,
         "temperature": 0.0}
        for p in prompts
    ]  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.parametrize("arch", ARCHS)
def test_family_equals_transformers_before_and_after_a_kill(arch: str, tmp_path: Path) -> None:
    directory, prompts = _screened(tmp_path, arch, 8, (1, 24, 100))
    expected = [list(p.output_ids) for p in prompts]
    bodies = _bodies(directory, prompts)
    with ServerProcess(directory, FLAGS, start_timeout_s=200) as server:
        assert server.status()["engines"][1]["device"].startswith("cuda")
        calm = asyncio.run(stream_all(server.url, bodies))
        assert [r.token_ids for r in calm] == expected
        fault = asyncio.run(run_with_kill(server, bodies, victim=1, after_tokens=8 * 16))
        assert [r.error for r in fault.results] == [None] * 8
        assert [r.token_ids for r in fault.results] == expected
        assert fault.status["recoveries"][0]["outcome"] == "recovered"
        assert fault.moved, "nobody lived on the killed rank"
        after = asyncio.run(stream_all(server.url, bodies))
        assert [r.token_ids for r in after] == expected


def test_streams_of_one_rank(tmp_path: Path) -> None:
    directory, prompts = _screened(tmp_path, "qwen3_moe", 4, (24,))
    flags = [*FLAGS, "--data-parallel-size", "1", "--redundant-experts", "0"]
    flags[flags.index("gloo")] = "auto"
    with ServerProcess(directory, flags, start_timeout_s=200) as server:
        results = asyncio.run(stream_all(server.url, _bodies(directory, prompts)))
    assert [r.token_ids for r in results] == [list(p.output_ids) for p in prompts]
    assert all(isinstance(r, StreamResult) and r.error is None for r in results)
