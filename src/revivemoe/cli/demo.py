"""`revivemoe demo`: a real kill under load, and proof that no stream noticed."""

import asyncio
import json
import random
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from revivemoe.cluster.server_process import ServerProcess
from revivemoe.loadgen import StreamResult, stream_all

RANKS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, VICTIM = 4, 16, 32, 96, 2
PROMPT_SEED = 0
"""These prompts' logit and router margins were checked against `transformers` to be wide
(tests/unit/cli/test_demo_prompts.py), so equality does not depend on how steps were batched."""


@dataclass(frozen=True)
class FaultRun:
    """What a run with a kill showed."""

    results: list[StreamResult]
    killed_at: float
    migrated: frozenset[str]
    status: dict[str, Any]


def demo() -> None:
    """Make a model, serve it on 4 ranks, kill one under 16 streams, compare with no fault."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="revivemoe-demo-") as folder:
        model_dir = Path(folder) / "model"
        console.print("making a random Qwen3-MoE checkpoint (4 layers, 16 experts) ...")
        _make_model(model_dir)
        flags = [
            "--data-parallel-size", str(RANKS), "--redundant-experts", "16",
            "--max-model-len", "512", "--dtype", "float32", "--device", "cpu",
        ]  # fmt: skip
        console.print(f"serving it on {RANKS} ranks, every expert on two of them ...")
        with ServerProcess(model_dir, flags) as server:
            console.print(f"ready after {server.start_s:.1f} s at {server.url}")
            identical = _compare(console, server)
    sys.exit(0 if identical else 1)


def _make_model(model_dir: Path) -> None:
    from revivemoe.checkpoint.make import make_model

    make_model(model_dir, "qwen3_moe", "tiny", 0)


def requests() -> list[dict[str, Any]]:
    """The demo's completions: half greedy, half seeded sampling."""
    from revivemoe.checkpoint.presets import SIZES

    draw, vocab_size = random.Random(PROMPT_SEED), SIZES["tiny"].vocab
    return [
        {
            "model": "model",
            "prompt": [draw.randrange(16, vocab_size) for _ in range(PROMPT_TOKENS)],
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0.0 if i % 2 == 0 else 0.8,
            "seed": i,
            "ignore_eos": True,
        }
        for i in range(STREAMS)
    ]


def _compare(console: Console, server: ServerProcess) -> bool:
    bodies = requests()
    console.print(f"{STREAMS} streams without a fault ...")
    asyncio.run(stream_all(server.url, bodies))  # warm-up
    calm = asyncio.run(stream_all(server.url, bodies))
    console.print(f"{STREAMS} streams again, and SIGKILL to rank {VICTIM} while they run ...")
    fault = asyncio.run(_run_with_kill(server, bodies))
    identical = sum(
        a.token_ids == b.token_ids and b.error is None and b.finish_reason == a.finish_reason
        for a, b in zip(calm, fault.results, strict=True)
    )
    _print_recovery(console, fault)
    _print_gaps(console, calm, fault)
    for result in fault.results:
        if result.error is not None:
            console.print(f"[red]stream failed: {result.error}")
    recovered = bool(fault.status["recoveries"]) and fault.status["state"] == "serving"
    console.print(
        f"[bold]{identical}/{STREAMS} streams identical to the run without the fault[/bold]"
    )
    return identical == STREAMS and recovered


async def _run_with_kill(server: ServerProcess, bodies: list[dict[str, Any]]) -> FaultRun:
    results = [StreamResult() for _ in bodies]
    streaming = asyncio.create_task(stream_all(server.url, bodies, results))
    half = len(bodies) * OUTPUT_TOKENS // 3
    while sum(len(r.token_ids) for r in results) < half and not streaming.done():
        await asyncio.sleep(0.002)
    killed_at = await asyncio.to_thread(server.kill_rank, VICTIM)
    await streaming
    status = await asyncio.to_thread(server.status)
    migrated = await asyncio.to_thread(migrated_requests, server.url, status["epoch"])
    return FaultRun(results, killed_at, migrated, status)


def migrated_requests(url: str, epoch: int, timeout_s: float = 5.0) -> frozenset[str]:
    """Ids of the requests that recovery into `epoch` moved, from the event stream."""
    found: list[frozenset[str]] = []

    def read() -> None:
        with httpx.stream("GET", f"{url}/v1/fault_tolerance/events", timeout=timeout_s) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                if event.get("event") == "migrated" and event["epoch"] == epoch:
                    found.append(frozenset(event["requests"]))
                    return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    return found[0] if found else frozenset()


def _print_recovery(console: Console, fault: FaultRun) -> None:
    for record in fault.status["recoveries"]:
        table = Table(title=f"recovery into epoch {record['epoch']}: {record['cause']}")
        table.add_column("stage")
        table.add_column("ms", justify="right")
        table.add_row("detect (at most)", f"{record['detect_s'] * 1e3:.1f}")
        for phase, seconds in record["phases"].items():
            table.add_row(phase, f"{seconds * 1e3:.1f}")
        if record["stall_s"] is not None:
            table.add_row("stall: last old step to first new", f"{record['stall_s'] * 1e3:.1f}")
        console.print(table)
        console.print(f"why this plan: {record['reason']}")
        console.print(
            f"{record['migrated']} sequences moved, {record['recomputed_tokens']} tokens computed "
            f"again, {record['experts_dropped']} expert replicas dropped"
        )


def _print_gaps(console: Console, calm: list[StreamResult], fault: FaultRun) -> None:
    survivors, migrated = split(fault)
    table = Table(title="longest gap between two tokens of a stream")
    table.add_column("streams")
    table.add_column("ms", justify="right")
    table.add_row("without a fault", f"{max(r.longest_gap_s() for r in calm) * 1e3:.0f}")
    for name, group in (("survivors' after the kill", survivors), ("migrated", migrated)):
        if group:
            worst = max(r.longest_gap_s(fault.killed_at) for r in group)
            table.add_row(name, f"{worst * 1e3:.0f}")
    console.print(table)


def split(fault: FaultRun) -> tuple[list[StreamResult], list[StreamResult]]:
    """Streams whose rank lived on, and those that moved."""
    moved = [r for r in fault.results if r.request_id in fault.migrated]
    stayed = [r for r in fault.results if r.request_id not in fault.migrated]
    return stayed, moved
