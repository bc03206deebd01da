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
from revivemoe.cluster.compiler import build
from revivemoe.config import cache_folders, compilers
from revivemoe.kernels.library import NoKernels

RANKS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, VICTIM = 4, 16, 32, 96, 2
PROMPT_SEEDS = (0, 1, 2, 35, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 31)
"""These prompts' logit and router margins were checked against `transformers` to be wide
(tests/unit/cli/test_demo_prompts.py), so equality does not depend on how steps were batched. In
bfloat16 no margin is wide; there each row's bits are its own instead, and any prompt will do."""
DTYPES = ("auto", "bfloat16", "float32")


def run(dtype: str, graphs: bool = False) -> bool:
    """Whether all streams were identical to those of the run without a fault. `dtype`: of `DTYPES`.

    Raises ValueError where bfloat16 is asked for and there is no compiler.
    """
    console = Console()
    dtype = _can_be_had(dtype, console)
    console.print("making a random Qwen3-MoE checkpoint (4 layers, 16 experts) ...")
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    with cleaned_up(), tempfile.TemporaryDirectory(prefix="revivemoe-demo-") as folder:
        model_dir = Path(folder) / "model"
        make_demo_model(model_dir)
        flags = [
            "--data-parallel-size", str(RANKS), "--redundant-experts", "16",
            "--max-model-len", "512", "--dtype", dtype, "--device", "cpu",
        ]  # fmt: skip
        flags += ["--batch-invariant"] if dtype == "bfloat16" else []
        if graphs:
            flags += ["--compilation-config", "1"]
            console.print("its layers are compiled first: half a minute, if that is the first time")
        console.print(f"serving it on {RANKS} ranks, every expert on two of them ...")
        with ServerProcess(model_dir, flags) as server:
            console.print(f"ready after {server.start_s:.1f} s at {server.url}")
            return _compare(console, server, requests(dtype))


def _can_be_had(dtype: str, console: Console) -> str:
    """bfloat16 where our kernels are, or can be built."""
    if dtype == "float32":
        return dtype
    console.print("kernels for this processor: they are there, or built now, once ...")
    try:
        build(cache_folders(), compilers())
    except (NoKernels, OSError) as error:
        if dtype == "bfloat16":
            raise ValueError(f"no kernels for --dtype bfloat16: {error}") from None
        console.print(f"none ({error}), so float32, with prompts whose margins are wide")
        return "float32"
    console.print("so bfloat16 with --batch-invariant: any prompts, the same bits to the last one")
    return "bfloat16"


def make_demo_model(model_dir: Path) -> None:
    make_model(model_dir, "qwen3_moe", "tiny", 0)


def requests(dtype: str) -> list[Body]:
    """The demo's completions: half greedy, half seeded sampling. In bfloat16 others each time."""
    vocab_size, any_seed = SIZES["tiny"].vocab, random.SystemRandom().randrange(1 << 32)
    seeds = PROMPT_SEEDS if dtype == "float32" else range(any_seed, any_seed + STREAMS)
    draws = [random.Random(seed) for seed in seeds]
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


def _compare(console: Console, server: ServerProcess, bodies: list[Body]) -> bool:
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
    if any(told := [e["graphs"] for e in fault.status["engines"]]):
        again = sum(e["recompiled"] for e in fault.status["engines"])
        console.print(f"[bold]recompiled {again}[/bold] (graphs of each rank: {'; '.join(told)})")
        recovered = recovered and not again
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
