"""`bench recovery`: what a SIGKILL of one rank costs streams, beside steps and a restart.

Each kill strikes a fresh deployment whose every expert has one replica, at another moment and on
another rank. Detection is true: from just before the kill to the accusation, by one clock.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from revivemoe.bench.models import bench_model
from revivemoe.cluster.server_process import ServerProcess
from revivemoe.faultrun import FaultRun, run_with_kill
from revivemoe.loadgen import StreamResult, stream_all
from revivemoe.recovery.record import PHASES


@dataclass(frozen=True)
class Setup:
    """One measurement's dimensions."""

    preset: str = "small"
    dtype: str = "bfloat16"
    ranks: int = 4
    streams: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 128
    kills: int = 10


def run(setup: Setup, console: Console) -> dict[str, Any]:
    """Measure; returns the document that is also written as JSON. Times in seconds."""
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, num_experts = bench_model(Path(folder), setup.preset, setup.dtype, console)
        flags = [
            "--data-parallel-size", str(setup.ranks), "--redundant-experts", str(num_experts),
            "--max-model-len", "1024",
        ]  # fmt: skip
        rows = [_one_kill(model_dir, flags, setup, i, console) for i in range(setup.kills)]
        restart_s = _restart(model_dir, flags, setup)
    document = {
        "bench": "recovery",
        "setup": vars(setup),
        "cores": len(os.sched_getaffinity(0)),
        "kills": rows,
        "restart_s": restart_s,
        "summary": {key: _spread([r[key] for r in rows]) for key in _KEYS},
    }
    _print(console, document)
    return document


_KEYS = (
    "detect_s", "stall_s", "survivor_gap_s", "migrated_gap_s", "recomputed_tokens", "step_s",
    "calm_gap_s", "prefill_rate", "aim_stall_s", "aim_migrated_s",
)  # fmt: skip


def _one_kill(
    model_dir: Path, flags: Sequence[str], setup: Setup, index: int, console: Console
) -> dict[str, Any]:
    draw = random.Random(index)
    with ServerProcess(model_dir, flags) as server:
        bodies = _bodies(model_dir, setup, draw)
        asyncio.run(stream_all(server.url, bodies))  # warm-up
        calm = asyncio.run(stream_all(server.url, bodies))
        rate = _prefill_rate(server, model_dir, draw)
        after = draw.randrange(setup.streams * 8, setup.streams * setup.output_tokens * 3 // 4)
        fault = asyncio.run(run_with_kill(server, bodies, index % setup.ranks, after))
    row = _row(calm, fault, rate)
    console.print(
        f"kill {index + 1}/{setup.kills}: stall {row['stall_s'] * 1e3:.0f} ms, survivors "
        f"{row['survivor_gap_s'] * 1e3:.0f} ms, migrated {row['migrated_gap_s'] * 1e3:.0f} ms, "
        f"step {row['step_s'] * 1e3:.0f} ms"
    )
    return row


def _bodies(model_dir: Path, setup: Setup, draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "model": model_dir.name,
            "prompt": [draw.randrange(16, 500) for _ in range(setup.prompt_tokens)],
            "max_tokens": setup.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(setup.streams)
    ]


def _row(calm: Sequence[StreamResult], fault: FaultRun, rate: float) -> dict[str, Any]:
    failed = [r.error for r in fault.results if r.error is not None]
    if failed or fault.status["state"] != "serving":
        raise RuntimeError(f"the recovery failed: {failed[:1]} {fault.status['recoveries']}")
    record = fault.status["recoveries"][-1]
    step_s = statistics.median(
        b - a for r in calm for a, b in zip(r.times, r.times[1:], strict=False)
    )
    bound = 2 * step_s + 0.1
    recomputed = record["recomputed_tokens"]
    return {
        "detect_s": fault.true_detect_s,
        "stall_s": record["stall_s"],
        "survivor_gap_s": _worst_gap(fault.survivors, fault.killed_at),
        "migrated_gap_s": _worst_gap(fault.moved, fault.killed_at),
        "migrated": record["migrated"],
        "recomputed_tokens": recomputed,
        "step_s": step_s,
        "calm_gap_s": _worst_gap(calm, 0.0),
        "prefill_rate": rate,
        "aim_stall_s": bound,
        "aim_migrated_s": bound + recomputed / rate,
        "phases": record["phases"],
        "identical": sum(
            a.token_ids == b.token_ids for a, b in zip(calm, fault.results, strict=True)
        ),
    }


def _worst_gap(results: Sequence[StreamResult], after: float) -> float:
    return max((r.longest_gap_s(after) for r in results), default=0.0)


def _prefill_rate(server: ServerProcess, model_dir: Path, draw: random.Random) -> float:
    """Prompt tokens per second of one rank with nothing else to do: median of five prompts."""
    length, rates = 512, []
    for _ in range(5):
        prompt = [draw.randrange(16, 500) for _ in range(length)]
        body = {"model": model_dir.name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        began = time.monotonic()
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        rates.append(length / (time.monotonic() - began))
    return statistics.median(rates)


def _restart(model_dir: Path, flags: Sequence[str], setup: Setup) -> float:
    """A full stop and start of the same deployment until it answers a request, seconds."""
    body = {"model": model_dir.name, "prompt": [20, 21], "max_tokens": 1}
    with ServerProcess(model_dir, flags) as server:
        began = time.monotonic()
        server.stop()
        server.restart()
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        return time.monotonic() - began


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": max(values), "least": min(values)}


def _print(console: Console, document: dict[str, Any]) -> None:
    table = Table(title=f"recovery from SIGKILL, {document['setup']}")
    for column in ("figure", "median", "worst"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    summary = document["summary"]
    for key, text in _LABELS.items():
        scale, unit = (1.0, "") if key in ("recomputed_tokens", "prefill_rate") else (1e3, " ms")
        cells = (f"{summary[key][which] * scale:.1f}{unit}" for which in ("median", "worst"))
        table.add_row(text, *cells)
    for phase in PHASES:
        values = [row["phases"][phase] for row in document["kills"]]
        table.add_row(f"phase: {phase}", *(f"{f(values) * 1e3:.1f} ms" for f in _STATS))
    console.print(table)
    console.print(f"full stop and start until it answers: {document['restart_s']:.1f} s")


_STATS: tuple[Callable[[Sequence[float]], float], ...] = (statistics.median, max)
_LABELS = {
    "detect_s": "detection (true)",
    "stall_s": "domain stall",
    "aim_stall_s": "  aim: 2 median steps + 0.1 s",
    "survivor_gap_s": "survivors' longest gap",
    "migrated_gap_s": "migrated streams' longest gap",
    "aim_migrated_s": "  aim: that + recomputed / prefill rate",
    "recomputed_tokens": "recomputed tokens",
    "prefill_rate": "prefill rate, tokens/s",
    "step_s": "median step without a fault",
    "calm_gap_s": "longest gap without a fault",
}
