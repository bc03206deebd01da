"""`bench throughput`: output tokens per second against transformers' continuous batching.

The rate is the slope between two output lengths, warm, so that fixed costs cancel: start-up,
prefill, and `generate_batch`'s long first call. Same checkpoint, prompts and machine; rounds of
both alternate, because machines drift.
"""

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revivemoe.bench import plain_http
from revivemoe.bench.loadgen import greedy, random_prompts, stream_all
from revivemoe.bench.models import bench_model
from revivemoe.bench.server_process import ServerProcess


@dataclass(frozen=True)
class Setup:
    preset: str = "small"
    dtype: str = "bfloat16"
    ranks: tuple[int, ...] = (1, 2, 4)
    streams: int = 16
    prompt_tokens: int = 64
    short: int = 32
    long: int = 160
    rounds: int = 3
    balance_streams: int = 160
    """Of the comparison of micro-batches: more, so that half of them still fill a batch."""
    balance_flags: tuple[str, ...] = ("--data-parallel-size", "1", "--expert-ranks", "1")
    microbatches: tuple[int, ...] = (1, 2)


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Measure; returns the document that is also written as JSON. Rates in tokens per second."""
    draw = random.Random(0)
    prompts = random_prompts(draw, setup.streams, setup.prompt_tokens)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, _ = bench_model(Path(folder), setup.preset, setup.dtype, console)
        prompts_file = Path(folder) / "prompts.json"
        prompts_file.write_text(json.dumps(prompts))
        halves = _microbatches(model_dir, setup, draw, console)
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
        "microbatches": [vars(half) for half in halves],
    }
    _print(console, rates)
    _print_halves(console, halves)
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
        _seconds(server, model_dir, prompts, setup.short)
        short_s = _seconds(server, model_dir, prompts, setup.short)
        long_s = _seconds(server, model_dir, prompts, setup.long)
    return _slope(setup, short_s, long_s)


def _seconds(
    server: ServerProcess, model_dir: Path, prompts: Sequence[Sequence[int]], length: int
) -> float:
    """For all prompts to be continued by so many tokens."""
    bodies = greedy(model_dir, prompts, length)
    began = time.monotonic()
    results = asyncio.run(stream_all(server.url, bodies, timeout_s=300))
    took = time.monotonic() - began
    assert all(len(r.token_ids) == length for r in results), "a stream is short"
    return took


@dataclass(frozen=True)
class Half:
    """One round with so many micro-batches. The idle shares are of the time in steps."""

    microbatches: int
    tokens_per_s: float
    attention_idle: float
    experts_idle: float


def _microbatches(
    model_dir: Path, setup: Setup, draw: random.Random, console: Console
) -> list[Half]:
    """One attention rank and one expert rank, a core each: rate and idle shares, round by round."""
    prompts = random_prompts(draw, setup.balance_streams, setup.prompt_tokens)
    common = [*setup.balance_flags, "--max-num-seqs", str(setup.balance_streams)]
    common += ["--max-model-len", "1024"]
    rows = []
    for round_ in range(setup.rounds):
        for count in setup.microbatches:
            console.print(f"micro-batches: {count}, round {round_ + 1}/{setup.rounds} ...")
            flags = [*common, "--num-microbatches", str(count)]
            with ServerProcess(model_dir, flags) as server:
                rows.append(_half(server, model_dir, prompts, setup, count))
    return rows


def _half(
    server: ServerProcess,
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    setup: Setup,
    count: int,
) -> Half:
    _seconds(server, model_dir, prompts, setup.short)
    short_s = _seconds(server, model_dir, prompts, setup.short)
    before = _waits(server)
    long_s = _seconds(server, model_dir, prompts, setup.long)
    after = _waits(server)
    idle = [
        (after[1][rank] - before[1][rank]) / (after[0][rank] - before[0][rank]) for rank in (0, 1)
    ]
    rate = len(prompts) * (setup.long - setup.short) / (long_s - short_s)
    return Half(count, rate, *idle)


def _waits(server: ServerProcess) -> tuple[list[float], list[float]]:
    """Seconds in steps, and of these waiting, by rank."""
    time.sleep(0.3)  # heartbeats bring them
    text = plain_http.get(f"{server.url}/metrics", timeout=10).text
    found = []
    for name in ("step", "wait"):
        pattern = rf'revivemoe_rank_{name}_seconds_total{{rank="(\d+)"}} (\S+)'
        found.append([float(v) for _, v in sorted(re.findall(pattern, text))])
    return found[0], found[1]


def _print_halves(console: Console, rows: Sequence[Half]) -> None:
    table = Table(title="one attention rank and one expert rank: medians over rounds")
    for column in ("micro-batches", "tokens/s", "ratio to one", "attention idle", "experts idle"):
        table.add_column(column, justify="right")
    first = 0.0
    for count in sorted({r.microbatches for r in rows}):
        same = [r for r in rows if r.microbatches == count]
        rate = statistics.median(r.tokens_per_s for r in same)
        first = first or rate
        attention = statistics.median(r.attention_idle for r in same)
        experts = statistics.median(r.experts_idle for r in same)
        idle = (f"{attention:.0%}", f"{experts:.0%}")
        table.add_row(str(count), f"{rate:.0f}", f"{rate / first:.2f}", *idle)
    console.print(table)


def _print(console: Console, rates: dict[str, list[float]]) -> None:
    peer = rates["generate_batch, one process"]
    table = Table(title="output tokens per second (slope between two lengths)")
    for column in ("system", "median", "least", "most", "median ratio to generate_batch"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, values in rates.items():
        ratio = statistics.median(v / p for v, p in zip(values, peer, strict=True))
        spread = [f"{f(values):.0f}" for f in (statistics.median, min, max)]
        table.add_row(name, *spread, f"{ratio:.2f}")
    console.print(table)
