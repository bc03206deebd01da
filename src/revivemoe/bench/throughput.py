"""`bench throughput`: output tokens per second against transformers' continuous batching.

The rate is the slope between two output lengths, warm, so that fixed costs cancel: start-up,
prefill, and `generate_batch`'s long first call. Same checkpoint, prompts and machine; rounds of
both alternate, because machines drift.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from revivemoe.bench.models import bench_model
from revivemoe.cluster.server_process import ServerProcess
from revivemoe.loadgen import stream_all


@dataclass(frozen=True)
class Setup:
    """One measurement's dimensions."""

    preset: str = "small"
    dtype: str = "bfloat16"
    ranks: tuple[int, ...] = (1, 2, 4)
    streams: int = 16
    prompt_tokens: int = 64
    short: int = 32
    long: int = 160
    rounds: int = 3


def run(setup: Setup, console: Console) -> dict[str, Any]:
    """Measure; returns the document that is also written as JSON. Rates in tokens per second."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(16, 500) for _ in range(setup.prompt_tokens)] for _ in range(setup.streams)
    ]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, _ = bench_model(Path(folder), setup.preset, setup.dtype, console)
        prompts_file = Path(folder) / "prompts.json"
        prompts_file.write_text(json.dumps(prompts))
        for round_ in range(setup.rounds):
            console.print(f"round {round_ + 1}/{setup.rounds} ...")
            peer = _peer_rate(model_dir, prompts_file, setup)
            rates.setdefault("generate_batch, one process", []).append(peer)
            for ranks in setup.ranks:
                rate = _our_rate(model_dir, prompts, setup, ranks)
                rates.setdefault(f"revivemoe, {ranks} ranks", []).append(rate)
    document = {
        "bench": "throughput",
        "setup": vars(setup),
        "cores": len(os.sched_getaffinity(0)),
        "tokens_per_s": rates,
    }
    _print(console, rates)
    return document


def _slope(setup: Setup, short_s: float, long_s: float) -> float:
    return setup.streams * (setup.long - setup.short) / (long_s - short_s)


def _peer_rate(model_dir: Path, prompts_file: Path, setup: Setup) -> float:
    command = [
        sys.executable, "-m", "revivemoe.bench.peer", str(model_dir), setup.dtype,
        str(prompts_file), str(setup.short), str(setup.long),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr[-2000:]}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return _slope(setup, seconds[str(setup.short)], seconds[str(setup.long)])


def _our_rate(model_dir: Path, prompts: Sequence[Sequence[int]], setup: Setup, ranks: int) -> float:
    flags = ["--data-parallel-size", str(ranks), "--max-model-len", "1024"]
    with ServerProcess(model_dir, flags) as server:

        def seconds(length: int) -> float:
            bodies = [
                {
                    "model": model_dir.name,
                    "prompt": list(prompt),
                    "max_tokens": length,
                    "temperature": 0.0,
                    "ignore_eos": True,
                }
                for prompt in prompts
            ]
            began = time.monotonic()
            results = asyncio.run(stream_all(server.url, bodies))
            took = time.monotonic() - began
            assert all(len(r.token_ids) == length for r in results), "a stream is short"
            return took

        seconds(setup.short)
        short_s, long_s = seconds(setup.short), seconds(setup.long)
    return _slope(setup, short_s, long_s)


def _print(console: Console, rates: dict[str, list[float]]) -> None:
    peer = rates["generate_batch, one process"]
    table = Table(title="output tokens per second (slope between two lengths)")
    for column in ("system", "median", "least", "most", "median ratio to generate_batch"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, values in rates.items():
        ratio = statistics.median(v / p for v, p in zip(values, peer, strict=True))
        table.add_row(
            name,
            *(f"{f(values):.0f}" for f in (statistics.median, min, max)),
            f"{ratio:.2f}",
        )
    console.print(table)
