"""`bench recovery`: what each kind of fault costs the streams, at several context lengths.

One deployment per context length takes one fault after the other, each at another moment and on
another rank; whoever was lost rejoins before the next. Detection is true: from just before the
fault (for those the rank brings upon itself: before it was told to) to the first sign of it.
"""

import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revivemoe.bench import paper_table, plain_http
from revivemoe.bench.faultrun import FaultRun, mend, run_with_fault
from revivemoe.bench.loadgen import StreamResult, gaps, greedy, random_prompts, warm
from revivemoe.bench.models import bench_model
from revivemoe.bench.restart import restart
from revivemoe.bench.server_process import ServerProcess
from revivemoe.epochs.record import PHASES

TABLES = ("paper", "kinds")
KINDS = ("kill", "stop", "hang", "error", "nan", "drain")


@dataclass(frozen=True)
class Setup:
    preset: str = "small"
    dtype: str = "bfloat16"
    ranks: int = 4
    streams: int = 16
    output_tokens: int = 64
    faults: int = 20
    """Of each kind at the shortest context; a quarter of it at the others."""
    kinds: tuple[str, ...] = KINDS
    contexts: tuple[int, ...] = (64, 500, 2000)
    """Prompt tokens. Only kills are measured beyond the shortest."""
    tables: tuple[str, ...] = TABLES
    rounds: int = 5
    """Of each scenario of the paper's table."""


@dataclass(frozen=True)
class Row:
    """One fault of a kind, at so many tokens of context. Times in seconds."""

    kind: str
    context: int
    figures: dict[str, float]
    phases: dict[str, float]


Spread = dict[str, float]
"""median, p99 and worst, in this order."""


@dataclass(frozen=True)
class Summary:
    """Of all faults of a kind at one context length."""

    kind: str
    context: int
    count: int
    figures: dict[str, Spread]
    phases: dict[str, Spread]


def _told(of: Row | Summary) -> dict[str, object]:
    """As JSON has it: the figures beside the rest."""
    return {name: value for name, value in vars(of).items() if name != "figures"} | of.figures


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Measure; returns the document that is also written as JSON. Times in seconds."""
    document: dict[str, object] = {
        "bench": "recovery",
        "setup": vars(setup),
        "cores": len(os.sched_getaffinity(0)),
    }
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, num_experts = bench_model(Path(folder), setup.preset, setup.dtype, console)
        if "paper" in setup.tables:
            load = paper_table.Load(rounds=setup.rounds)
            document["paper"] = paper_table.run(model_dir, num_experts, load, console)
        if "kinds" in setup.tables:
            document |= _kinds(model_dir, num_experts, setup, console)
    return document


def _kinds(model_dir: Path, num_experts: int, setup: Setup, console: Console) -> dict[str, object]:
    """Each kind of fault, at each context length, on one collocated deployment."""
    rows: list[Row] = []
    policy = model_dir.parent / "policy.toml"
    policy.write_text(paper_table.LIMITS)
    flags = [
        "--data-parallel-size", str(setup.ranks), "--redundant-experts", str(num_experts),
        "--max-model-len", "2304", "--enable-fault-injection",
        "--recovery-policy", str(policy),
    ]  # fmt: skip
    for context in setup.contexts:
        rows += _context(model_dir, flags, setup, context, console)
    restart_s, summaries = restart(model_dir, flags)["total"], _summaries(rows)
    _print(console, summaries)
    console.print(f"full stop and start until it answers: {restart_s:.1f} s")
    told, summary = [_told(row) for row in rows], [_told(summary) for summary in summaries]
    return {"faults": told, "restart_s": restart_s, "summary": summary}


def _context(
    model_dir: Path, flags: Sequence[str], setup: Setup, context: int, console: Console
) -> list[Row]:
    shortest = context == min(setup.contexts)
    kinds = setup.kinds if shortest else setup.kinds[:1]
    count = setup.faults if shortest else max(3, setup.faults // 4)
    total, draw = setup.streams * setup.output_tokens, random.Random(context)
    rows: list[Row] = []
    with ServerProcess(model_dir, flags) as server:
        prompts = random_prompts(draw, setup.streams, context)
        bodies = greedy(model_dir, prompts, setup.output_tokens)
        calm = warm(server.url, bodies)
        rate = _prefill_rate(server, model_dir, draw)
        for kind in kinds:
            for index in range(count):
                strike = _strike(server, kind, index % setup.ranks)
                after = draw.randrange(total // 8, total // 2)
                fault = asyncio.run(run_with_fault(server, bodies, strike, after))
                mend(server)
                phases = fault.status["recoveries"][-1]["phases"]
                rows.append(Row(kind, context, _figures(calm, fault, rate), phases))
                console.print(_line(rows[-1], index, count))
    return rows


def _strike(server: ServerProcess, kind: str, victim: int) -> Callable[[], object]:
    """What brings the fault about."""
    if kind in ("kill", "stop"):
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        return partial(server.kill_pid, server.rank_pid(victim), number)
    body: dict[str, object] = {"id": victim, "kind": kind}
    if kind == "drain":
        body = {"id": victim, "kind": "device_fault", "params": {"level": 4}}
    return partial(server.post, "inject", body)


def _figures(calm: Sequence[StreamResult], fault: FaultRun, rate: float) -> dict[str, float]:
    failed = [r.error for r in fault.results if r.error is not None]
    if failed or fault.status["state"] != "serving":
        raise RuntimeError(f"the recovery failed: {failed[:1]} {fault.status['recoveries'][-1:]}")
    record = fault.status["recoveries"][-1]
    step_s = statistics.median(gaps(calm))
    recomputed, bound = record["recomputed_tokens"], 2 * step_s + 0.1
    resumed = fault.killed_at + fault.true_detect_s + (record["stall_s"] or 0.0)
    after = gaps(fault.survivors, resumed)
    return {
        "detect_s": fault.true_detect_s,
        "stall_s": record["stall_s"] or 0.0,
        "survivor_gap_s": max(gaps(fault.survivors, fault.killed_at), default=0.0),
        "migrated_gap_s": max(gaps(fault.moved, fault.killed_at), default=0.0),
        "survivor_pace": statistics.median(after) / step_s if after else 1.0,
        "migrated": record["migrated"],
        "recomputed_tokens": recomputed,
        "step_s": step_s,
        "aim_stall_s": bound,
        "aim_migrated_s": bound + recomputed / rate,
        "prefill_rate": rate,
        "rolled_back": record["rolled_back"],
    }


def _prefill_rate(server: ServerProcess, model_dir: Path, draw: random.Random) -> float:
    """Prompt tokens per second of one rank with nothing else to do: median of five prompts."""
    length, rates = 512, []
    for _ in range(5):
        (prompt,) = random_prompts(draw, 1, length)
        body = {"model": model_dir.name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        began = time.monotonic()
        plain_http.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        rates.append(length / (time.monotonic() - began))
    return statistics.median(rates)


FIGURES = {
    "detect_s": "detection (true)",
    "stall_s": "domain stall",
    "survivor_gap_s": "survivors' gap",
    "migrated_gap_s": "migrated gap",
}
AIMS = ("aim_stall_s", "aim_migrated_s")
OTHERS = ("survivor_pace", "recomputed_tokens", "step_s", *AIMS)


def _summaries(rows: Sequence[Row]) -> list[Summary]:
    """Per kind and context: median, p99 and worst of each figure."""
    found = []
    for kind, context in sorted({(r.kind, r.context) for r in rows}, key=lambda k: k[::-1]):
        same = [r for r in rows if (r.kind, r.context) == (kind, context)]
        figures = {k: _spread([r.figures[k] for r in same]) for k in (*FIGURES, *OTHERS)}
        phases = {p: _spread([r.phases[p] for r in same]) for p in PHASES}
        found.append(Summary(kind, context, len(same), figures, phases))
    return found


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"median": statistics.median(ordered), "p99": p99, "worst": ordered[-1]}


def _line(row: Row, index: int, count: int) -> str:
    figures = ", ".join(f"{text} {row.figures[key] * 1e3:.0f}" for key, text in FIGURES.items())
    return f"{row.kind} at {row.context} tokens, {index + 1}/{count}: {figures} ms"


def _print(console: Console, summaries: Sequence[Summary]) -> None:
    table = Table(title="recovery, milliseconds: median / p99 / worst")
    for column in ("fault", "context", "n", *FIGURES.values(), "aim: stall", "aim: migrated"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in summaries:
        spreads = [row.figures[key].values() for key in FIGURES]
        cells = [" / ".join(f"{seconds * 1e3:.0f}" for seconds in spread) for spread in spreads]
        aims = [f"{row.figures[aim]['median'] * 1e3:.0f}" for aim in AIMS]
        table.add_row(row.kind, str(row.context), str(row.count), *cells, *aims)
    console.print(table)
    phases = Table(title="phases, milliseconds: median / worst")
    for column in ("fault", "context", *PHASES):
        phases.add_column(column)
    for row in summaries:
        found = [row.phases[p] for p in PHASES]
        cells = [f"{p['median'] * 1e3:.1f} / {p['worst'] * 1e3:.1f}" for p in found]
        phases.add_row(row.kind, str(row.context), *cells)
    console.print(phases)
