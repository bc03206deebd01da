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
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from revivemoe.bench import paper_table
from revivemoe.bench.faultrun import FaultRun, run_with_fault
from revivemoe.bench.loadgen import StreamResult, stream_all
from revivemoe.bench.models import bench_model
from revivemoe.bench.server_process import ServerProcess
from revivemoe.epochs.record import PHASES

TABLES = ("paper", "kinds")
KINDS = ("kill", "stop", "hang", "error", "nan", "drain")
POLICY = "[limits]\nmax_recoveries = 100000\nmax_restarts = 100000\n"


@dataclass(frozen=True)
class Setup:
    """One measurement's dimensions."""

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


def run(setup: Setup, console: Console) -> dict[str, Any]:
    """Measure; returns the document that is also written as JSON. Times in seconds."""
    document: dict[str, Any] = {
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


def _kinds(model_dir: Path, num_experts: int, setup: Setup, console: Console) -> dict[str, Any]:
    """Each kind of fault, at each context length, on one collocated deployment."""
    rows: list[dict[str, Any]] = []
    policy = model_dir.parent / "policy.toml"
    policy.write_text(POLICY)
    flags = [
        "--data-parallel-size", str(setup.ranks), "--redundant-experts", str(num_experts),
        "--max-model-len", "2304", "--enable-fault-injection",
        "--recovery-policy", str(policy),
    ]  # fmt: skip
    for context in setup.contexts:
        rows += _context(model_dir, flags, setup, context, console)
    restart_s = _restart(model_dir, flags)
    found = {"faults": rows, "restart_s": restart_s, "summary": _summary(rows)}
    _print(console, found)
    return found


def _context(
    model_dir: Path, flags: Sequence[str], setup: Setup, context: int, console: Console
) -> list[dict[str, Any]]:
    shortest = context == min(setup.contexts)
    kinds = setup.kinds if shortest else setup.kinds[:1]
    count = setup.faults if shortest else max(3, setup.faults // 4)
    draw, rows = random.Random(context), []
    with ServerProcess(model_dir, flags) as server:
        bodies = _bodies(model_dir, setup, context, draw)
        asyncio.run(stream_all(server.url, bodies, timeout_s=300))  # warm-up
        calm = asyncio.run(stream_all(server.url, bodies, timeout_s=300))
        rate = _prefill_rate(server, model_dir, draw)
        for kind in kinds:
            for index in range(count):
                rows.append(_one(server, kind, index, setup, context, calm, rate, bodies, draw))
                console.print(_line(rows[-1], index, count))
    return rows


def _bodies(
    model_dir: Path, setup: Setup, context: int, draw: random.Random
) -> list[dict[str, Any]]:
    return [
        {
            "model": model_dir.name,
            "prompt": [draw.randrange(16, 500) for _ in range(context)],
            "max_tokens": setup.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(setup.streams)
    ]


def _one(
    server: ServerProcess,
    kind: str,
    index: int,
    setup: Setup,
    context: int,
    calm: Sequence[StreamResult],
    rate: float,
    bodies: Sequence[dict[str, Any]],
    draw: random.Random,
) -> dict[str, Any]:
    victim = index % setup.ranks
    total = setup.streams * setup.output_tokens
    after = draw.randrange(total // 8, total // 2)
    fault = asyncio.run(run_with_fault(server, bodies, _strike(server, kind, victim), after))
    _mend(server)
    return {"kind": kind, "context": context, **_row(calm, fault, rate)}


def _strike(server: ServerProcess, kind: str, victim: int) -> Callable[[], None]:
    """What brings the fault about."""
    if kind in ("kill", "stop"):
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        pid = server.rank_pid(victim)
        return partial(_signal, server, pid, number)
    body: dict[str, Any] = {"id": victim, "kind": kind}
    if kind == "drain":
        body = {"id": victim, "kind": "device_fault", "params": {"level": 4}}
    return lambda: _post(server, "inject", body)


def _signal(server: ServerProcess, pid: int, number: signal.Signals) -> None:
    server.kill_pid(pid, number)


def _post(server: ServerProcess, what: str, body: dict[str, Any]) -> None:
    url = f"{server.url}/v1/fault_tolerance/{what}"
    httpx.post(url, json=body, timeout=10).raise_for_status()


def _mend(server: ServerProcess, timeout_s: float = 60.0) -> None:
    """Let whoever was lost rejoin."""
    dead = [e["id"] for e in server.status()["engines"] if e["status"] == "dead"]
    for rank in dead:
        _post(server, "apply", {"instruction": "rejoin", "params": {"id": rank}})
    deadline = time.monotonic() + timeout_s
    while any(e["logical_rank"] is None for e in server.status()["engines"]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {dead} did not rejoin within {timeout_s:.0f} s")
        time.sleep(0.05)


def _row(calm: Sequence[StreamResult], fault: FaultRun, rate: float) -> dict[str, Any]:
    failed = [r.error for r in fault.results if r.error is not None]
    if failed or fault.status["state"] != "serving":
        raise RuntimeError(f"the recovery failed: {failed[:1]} {fault.status['recoveries'][-1:]}")
    record = fault.status["recoveries"][-1]
    step_s = statistics.median(_gaps(calm, 0.0))
    recomputed, bound = record["recomputed_tokens"], 2 * step_s + 0.1
    resumed = fault.killed_at + fault.true_detect_s + (record["stall_s"] or 0.0)
    after = _gaps(fault.survivors, resumed)
    return {
        "detect_s": fault.true_detect_s,
        "stall_s": record["stall_s"] or 0.0,
        "survivor_gap_s": max(_gaps(fault.survivors, fault.killed_at), default=0.0),
        "migrated_gap_s": max(_gaps(fault.moved, fault.killed_at), default=0.0),
        "survivor_pace": statistics.median(after) / step_s if after else 1.0,
        "migrated": record["migrated"],
        "recomputed_tokens": recomputed,
        "step_s": step_s,
        "aim_stall_s": bound,
        "aim_migrated_s": bound + recomputed / rate,
        "prefill_rate": rate,
        "phases": record["phases"],
        "rolled_back": record["rolled_back"],
    }


def _gaps(results: Sequence[StreamResult], after: float) -> list[float]:
    """Times between consecutive tokens that ended later than `after`."""
    return [b - a for r in results for a, b in zip(r.times, r.times[1:], strict=False) if b > after]


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


def _restart(model_dir: Path, flags: Sequence[str]) -> float:
    """A full stop and start of the same deployment until it answers a request, seconds."""
    body = {"model": model_dir.name, "prompt": [20, 21], "max_tokens": 1}
    with ServerProcess(model_dir, flags) as server:
        began = time.monotonic()
        server.stop()
        server.restart()
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        return time.monotonic() - began


# ---- what is told -----------------------------------------------------------------------------

FIGURES = {
    "detect_s": "detection (true)",
    "stall_s": "domain stall",
    "survivor_gap_s": "survivors' gap",
    "migrated_gap_s": "migrated gap",
}
OTHERS = ("survivor_pace", "recomputed_tokens", "step_s", "aim_stall_s", "aim_migrated_s")


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind and context: median, p99 and worst of each figure."""
    found = []
    for kind, context in sorted({(r["kind"], r["context"]) for r in rows}, key=lambda k: k[::-1]):
        same = [r for r in rows if (r["kind"], r["context"]) == (kind, context)]
        figures = {k: _spread([r[k] for r in same]) for k in (*FIGURES, *OTHERS)}
        phases = {p: _spread([r["phases"][p] for r in same]) for p in PHASES}
        found.append(
            {"kind": kind, "context": context, "count": len(same), **figures, "phases": phases}
        )
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"median": statistics.median(ordered), "p99": p99, "worst": ordered[-1]}


def _line(row: dict[str, Any], index: int, count: int) -> str:
    figures = ", ".join(f"{text} {row[key] * 1e3:.0f}" for key, text in FIGURES.items())
    return f"{row['kind']} at {row['context']} tokens, {index + 1}/{count}: {figures} ms"


def _print(console: Console, document: dict[str, Any]) -> None:
    table = Table(title="recovery, milliseconds: median / p99 / worst")
    for column in ("fault", "context", "n", *FIGURES.values(), "aim: stall", "aim: migrated"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in document["summary"]:
        cells = [
            " / ".join(f"{row[key][which] * 1e3:.0f}" for which in ("median", "p99", "worst"))
            for key in FIGURES
        ]
        aims = [f"{row[key]['median'] * 1e3:.0f}" for key in ("aim_stall_s", "aim_migrated_s")]
        table.add_row(row["kind"], str(row["context"]), str(row["count"]), *cells, *aims)
    console.print(table)
    phases = Table(title="phases, milliseconds: median / worst")
    for column in ("fault", "context", *PHASES):
        phases.add_column(column)
    for row in document["summary"]:
        cells = [
            f"{row['phases'][p]['median'] * 1e3:.1f} / {row['phases'][p]['worst'] * 1e3:.1f}"
            for p in PHASES
        ]
        phases.add_row(row["kind"], str(row["context"]), *cells)
    console.print(phases)
    console.print(f"full stop and start until it answers: {document['restart_s']:.1f} s")
