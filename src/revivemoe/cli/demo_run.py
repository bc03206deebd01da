"""A real kill under load, and proof that no stream noticed."""

import asyncio
import importlib
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revivemoe.bench.faultrun import FaultRun, run_with_kill
from revivemoe.bench.loadgen import Body, StreamResult, stream_all
from revivemoe.bench.server_process import ServerProcess
from revivemoe.checkpoint.make import make_model
from revivemoe.checkpoint.presets import SIZES
from revivemoe.cli.interrupts import cleaned_up

RANKS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, VICTIM = 4, 16, 32, 96, 2
PROMPT_SEEDS = (0, 1, 2, 35, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 31)
"""These prompts' logit and router margins were checked against `transformers` to be wide
(tests/unit/cli/test_demo_prompts.py), so equality does not depend on how steps were batched."""


def run() -> bool:
    """Whether all streams were identical to those of the run without a fault."""
    console = Console()
    console.print("making a random Qwen3-MoE checkpoint (4 layers, 16 experts) ...")
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    with cleaned_up(), tempfile.TemporaryDirectory(prefix="revivemoe-demo-") as folder:
        model_dir = Path(folder) / "model"
        make_demo_model(model_dir)
        flags = [
            "--data-parallel-size", str(RANKS), "--redundant-experts", "16",
            "--max-model-len", "512", "--dtype", "float32", "--device", "cpu",
        ]  # fmt: skip
        console.print(f"serving it on {RANKS} ranks, every expert on two of them ...")
        with ServerProcess(model_dir, flags) as server:
            console.print(f"ready after {server.start_s:.1f} s at {server.url}")
            return _compare(console, server)


def make_demo_model(model_dir: Path) -> None:
    make_model(model_dir, "qwen3_moe", "tiny", 0)


def requests() -> list[Body]:
    """The demo's completions: half greedy, half seeded sampling."""
    vocab_size = SIZES["tiny"].vocab
    draws = [random.Random(seed) for seed in PROMPT_SEEDS]
    return [
        {
            "model": "model",
            "prompt": [draw.randrange(16, vocab_size) for _ in range(PROMPT_TOKENS)],
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0.0 if i % 2 == 0 else 0.8,
            "seed": i,
            "ignore_eos": True,
        }
        for i, draw in enumerate(draws)
    ]


def _compare(console: Console, server: ServerProcess) -> bool:
    bodies = requests()
    console.print(f"{STREAMS} streams without a fault ...")
    asyncio.run(stream_all(server.url, bodies))  # warm-up
    calm = asyncio.run(stream_all(server.url, bodies))
    console.print(f"{STREAMS} streams again, and SIGKILL to rank {VICTIM} while they run ...")
    fault = asyncio.run(run_with_kill(server, bodies, VICTIM, STREAMS * OUTPUT_TOKENS // 3))
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
    table = Table(title="longest gap between two tokens of a stream")
    table.add_column("streams")
    table.add_column("ms", justify="right")
    table.add_row("without a fault", f"{max(r.longest_gap_s() for r in calm) * 1e3:.0f}")
    for name, group in (("survivors' after the kill", fault.survivors), ("migrated", fault.moved)):
        if group:
            worst = max(r.longest_gap_s(fault.killed_at) for r in group)
            table.add_row(name, f"{worst * 1e3:.0f}")
    console.print(table)
