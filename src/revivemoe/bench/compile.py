"""`bench compile`: what graphs cost at a start, by what is there already, and what they bring.

Each start is a server of its own: without graphs; on an empty folder (cold), where of ranks that
start at once one compiles; once more (warm); on a folder that `precompile` has filled. In both
layouts: an expert rank has no graphs. Tokens per second: both modes served at once, rounds take
turns.
"""

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revivemoe.bench.loadgen import greedy, random_prompts, stream_all, warm
from revivemoe.bench.models import bench_model
from revivemoe.bench.server_process import ServerProcess

LAYOUTS = {
    "4 ranks": ("--data-parallel-size", "4"),
    "2 attention ranks, 2 expert ranks": ("--data-parallel-size", "2", "--expert-ranks", "2"),
}
GRAPHS = ("--compilation-config", "1")
START_S = 600.0


@dataclass(frozen=True)
class Setup:
    preset: str = "small"
    dtype: str = "bfloat16"
    streams: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 128
    rounds: int = 3


@dataclass(frozen=True)
class Start:
    layout: str
    folder: str
    """What lay there: none (no graphs), cold, warm, precompiled."""
    seconds: float
    """Until it served."""
    graphs: list[str]
    """By rank, as the rank tells it."""


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Measure; returns the document that is also written as JSON. Seconds, tokens per second."""
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, _ = bench_model(Path(folder), setup.preset, setup.dtype, console)
        starts, precompile_s = list[Start](), list[float]()
        for number, (layout, flags) in enumerate(LAYOUTS.items()):
            empty, ahead = Path(folder) / f"empty{number}", Path(folder) / f"ahead{number}"
            console.print(f"{layout}: precompile ...")
            precompile_s.append(_precompile(model_dir, flags, ahead))
            for what, more in (
                ("none", ()),
                ("cold", (*GRAPHS, "--compile-cache", str(empty))),
                ("warm", (*GRAPHS, "--compile-cache", str(empty))),
                ("precompiled", (*GRAPHS, "--compile-cache", str(ahead))),
            ):
                console.print(f"{layout}: {what} ...")
                starts.append(_start(model_dir, layout, what, (*flags, *more)))
        rates = _rates(model_dir, setup, Path(folder) / "rates", console)
    _print(console, starts, rates)
    return {
        "bench": "compile",
        "setup": vars(setup),
        "cores": len(os.sched_getaffinity(0)),
        "precompile_s": precompile_s,
        "starts": [vars(start) for start in starts],
        "tokens_per_s": rates,
    }


def _precompile(model_dir: Path, flags: Sequence[str], folder: Path) -> float:
    command = [sys.executable, "-m", "revivemoe.cli.main", "precompile", str(model_dir), *flags]
    began = time.monotonic()
    subprocess.run(
        [*command, "--compile-cache", str(folder)], check=True, capture_output=True, timeout=START_S
    )
    return time.monotonic() - began


def _start(model_dir: Path, layout: str, what: str, flags: Sequence[str]) -> Start:
    with ServerProcess(model_dir, flags, START_S) as server:
        graphs = [engine["graphs"] for engine in server.status()["engines"]]
        return Start(layout, what, server.start_s, graphs)


def _rates(model_dir: Path, setup: Setup, folder: Path, console: Console) -> dict[str, list[float]]:
    prompts = random_prompts(random.Random(0), setup.streams, setup.prompt_tokens)
    bodies = greedy(model_dir, prompts, setup.output_tokens)
    modes = {"eager": ("--enforce-eager",), "graphs": (*GRAPHS, "--compile-cache", str(folder))}
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    with ExitStack() as stack:
        servers = {
            mode: stack.enter_context(ServerProcess(model_dir, flags, START_S))
            for mode, flags in modes.items()
        }
        for server in servers.values():
            warm(server.url, bodies)
        for number in range(setup.rounds):
            for mode, server in servers.items():
                began = time.monotonic()
                asyncio.run(stream_all(server.url, bodies))
                rate = setup.streams * setup.output_tokens / (time.monotonic() - began)
                rates[mode].append(rate)
                console.print(f"round {number + 1}/{setup.rounds}: {mode}, {rate:.0f} tokens/s")
    return rates


def _print(console: Console, starts: list[Start], rates: dict[str, list[float]]) -> None:
    table = Table(title="start of a server, seconds")
    for name in ("layout", "graphs that are there", "until it serves", "graphs of each rank"):
        table.add_column(name)
    for start in starts:
        told = "; ".join(start.graphs)
        table.add_row(start.layout, start.folder, f"{start.seconds:.1f}", told)
    console.print(table)
    middle = {mode: statistics.median(all_) for mode, all_ in rates.items()}
    console.print(
        f"1 rank, {len(next(iter(rates.values())))} rounds in turn: eager {middle['eager']:.0f} "
        f"tokens/s, graphs {middle['graphs']:.0f}: {middle['graphs'] / middle['eager']:.2f}"
    )
