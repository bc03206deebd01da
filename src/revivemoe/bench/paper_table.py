"""`bench recovery`: the paper's table (restart, attention failure, expert failures, collocated).

Each scenario is a deployment of its own; each round of it takes one real SIGKILL under load. Where
the membership is another one afterwards (role switches), each round has a fresh deployment.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from revivemoe.bench.documents import Recovery
from revivemoe.bench.faultrun import FaultRun, await_status, mend, run_with_fault
from revivemoe.bench.loadgen import Body, StreamResult, gaps, greedy, random_prompts, warm
from revivemoe.bench.restart import CATEGORIES, restart
from revivemoe.bench.server_process import ServerProcess
from revivemoe.epochs.record import PHASES

LIMITS = "[limits]\nmax_recoveries = 100000\nmax_restarts = 100000\n[rejoin]\nauto = false\n"


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    attention: int
    experts: int
    victim: int
    redundant: bool
    policy: str = ""
    fresh: bool = False
    """Each round needs a deployment of its own."""
    foreground: bool = False
    """Loading is part of the stall."""


SCENARIOS = (
    Scenario("attention failure, disaggregated", 3, 2, 1, True),
    Scenario("expert failure, redundant experts", 3, 2, 4, True),
    Scenario(
        "expert failure, missing experts", 3, 2, 4, False,
        '[experts]\nrepair = ["mask"]\nmax_missing_fraction = 0.9\n',
    ),
    Scenario(
        "expert failure, role switch, foreground", 3, 2, 4, False,
        '[experts]\nrepair = ["role_switch"]\n', fresh=True, foreground=True,
    ),
    Scenario(
        "expert failure, role switch, background", 3, 2, 4, False,
        '[experts]\nrepair = ["role_switch"]\nserve_masked_meanwhile = true\n'
        "max_missing_fraction = 0.9\n", fresh=True,
    ),
    Scenario("collocated failure", 4, 0, 1, True),
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What runs meanwhile."""

    streams: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 64
    rounds: int = 5


class Round(TypedDict):
    """What one round showed. Times in seconds; some lists have an entry per change of epoch."""

    scenario: str
    detect_s: float
    stall_s: float
    stalls_s: list[float]
    aim_s: float
    step_s: float
    phases: list[dict[str, float]]
    role_switched: list[int | None]
    recomputed_tokens: int
    loaded_bytes: int
    load_s: float
    load_bytes_per_s: float
    sources: list[dict[str, int]]
    """Bytes by where they came from, of each rank that loaded."""


def run(model_dir: Path, num_experts: int, load: Load, console: Console) -> dict[str, object]:
    """Measure; returns the document. Times in seconds."""
    bandwidth = plain_read(model_dir)
    flags = _flags(model_dir, num_experts, SCENARIOS[0])
    restarts = [restart(model_dir, flags) for _ in range(max(2, load.rounds // 2))]
    rows: list[Round] = []
    for scenario in SCENARIOS:
        rows += _rounds(model_dir, num_experts, scenario, load, bandwidth, console)
    _print(console, bandwidth, restarts, rows)
    _print_phases(console, rows)
    _print_restarts(console, restarts)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "plain_read_bytes_per_s": bandwidth,
        "restarts": restarts,
        "rounds": rows,
    }


def plain_read(model_dir: Path) -> float:
    """Bytes per second of a plain read of the checkpoint, in pieces, from the page cache (as a
    reload finds it): median of three.
    """
    file = max(model_dir.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    piece = bytearray(1 << 20)
    rates = []
    for _ in range(4):
        began, total = time.monotonic(), 0
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(piece):
                total += count
        rates.append(total / (time.monotonic() - began))
    return statistics.median(rates[1:])


def _flags(model_dir: Path, num_experts: int, scenario: Scenario) -> list[str]:
    policy = model_dir.parent / f"policy-{abs(hash(scenario.name))}.toml"
    policy.write_text(LIMITS + scenario.policy)
    return [
        "--data-parallel-size", str(scenario.attention),
        "--expert-ranks", str(scenario.experts),
        "--redundant-experts", str(num_experts if scenario.redundant else 0),
        "--max-model-len", "1024", "--recovery-policy", str(policy),
    ]  # fmt: skip


def _rounds(
    model_dir: Path,
    num_experts: int,
    scenario: Scenario,
    load: Load,
    bandwidth: float,
    console: Console,
) -> list[Round]:
    flags, draw = _flags(model_dir, num_experts, scenario), random.Random(scenario.name)
    rows: list[Round] = []
    while len(rows) < load.rounds:
        with ServerProcess(model_dir, flags) as server:
            prompts = random_prompts(draw, load.streams, load.prompt_tokens)
            bodies = greedy(model_dir, prompts, load.output_tokens)
            calm = warm(server.url, bodies)
            count = 1 if scenario.fresh else load.rounds
            for _ in range(count):
                rows.append(_round(server, scenario, load, calm, bodies, bandwidth, draw))
                console.print(_line(rows[-1], len(rows), load.rounds))
    return rows


def _round(
    server: ServerProcess,
    scenario: Scenario,
    load: Load,
    calm: Sequence[StreamResult],
    bodies: Sequence[Body],
    bandwidth: float,
    draw: random.Random,
) -> Round:
    seen = len(server.status()["recoveries"])
    total = load.streams * load.output_tokens
    strike = partial(server.kill_pid, server.rank_pid(scenario.victim))
    after = draw.randrange(total // 8, total // 2)
    fault = asyncio.run(run_with_fault(server, bodies, strike, after))
    failed = [r.error for r in fault.results if r.error is not None]
    if failed:
        raise RuntimeError(f"{scenario.name}: a stream failed: {failed[0]}")
    if "background" in scenario.name:
        await_status(server, lambda status: not status["experts"]["missing"], "the switch")
    records = server.status()["recoveries"][seen:]
    row = _figures(scenario, calm, fault, records, bandwidth)
    if not scenario.fresh:
        mend(server)
    return row


def _figures(
    scenario: Scenario,
    calm: Sequence[StreamResult],
    fault: FaultRun,
    records: Sequence[Recovery],
    bandwidth: float,
) -> Round:
    step_s = statistics.median(gaps(calm))
    loaded = [e for e in fault.events if e["event"] == "loaded"]
    num_bytes = sum(e["bytes"] for e in loaded)
    seconds = max((e["seconds"] for e in loaded), default=0.0)
    aim_s = 2 * step_s + 0.1
    if scenario.foreground:
        aim_s += num_bytes / (0.8 * bandwidth)
    stalls = [r["stall_s"] or 0.0 for r in records]
    return {
        "scenario": scenario.name,
        "detect_s": fault.true_detect_s,
        "stall_s": max(stalls),
        "stalls_s": stalls,
        "aim_s": aim_s,
        "step_s": step_s,
        "phases": [r["phases"] for r in records],
        "role_switched": [r["role_switched"] for r in records],
        "recomputed_tokens": sum(r["recomputed_tokens"] for r in records),
        "loaded_bytes": num_bytes,
        "load_s": seconds,
        "load_bytes_per_s": num_bytes / seconds if seconds else 0.0,
        "sources": [e["sources"] for e in loaded],
    }


def _line(row: Round, number: int, of: int) -> str:
    stalls = ", ".join(f"{s * 1e3:.0f}" for s in row["stalls_s"])
    return f"{row['scenario']}, {number}/{of}: stall {stalls} ms (aim {row['aim_s'] * 1e3:.0f})"


def _print(
    console: Console,
    bandwidth: float,
    restarts: Sequence[dict[str, float]],
    rounds: Sequence[Round],
) -> None:
    restart_s = statistics.median(r["total"] for r in restarts)
    table = Table(title="the paper's table, milliseconds: median / worst")
    for column in ("scenario", "n", "detection", "stall", "aim", "met", "of a restart", "loaded"):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    table.add_row("restart", str(len(restarts)), "", f"{restart_s * 1e3:.0f}", "", "", "100 %", "")
    for scenario in SCENARIOS:
        rows = [r for r in rounds if r["scenario"] == scenario.name]
        stall_s = statistics.median(r["stall_s"] for r in rows)
        met = sum(r["stall_s"] <= r["aim_s"] for r in rows)
        table.add_row(
            scenario.name,
            str(len(rows)),
            _pair([r["detect_s"] for r in rows]),
            _pair([r["stall_s"] for r in rows]),
            f"{statistics.median(r['aim_s'] for r in rows) * 1e3:.0f}",
            f"{met}/{len(rows)}",
            f"{stall_s / restart_s:.1%}",
            _loaded(rows, bandwidth),
        )
    console.print(table)


def _pair(values: Sequence[float]) -> str:
    return f"{statistics.median(values) * 1e3:.0f} / {max(values) * 1e3:.0f}"


def _loaded(rows: Sequence[Round], plain: float) -> str:
    rates = [r["load_bytes_per_s"] for r in rows if r["load_bytes_per_s"]]
    if not rates:
        return ""
    rate, num_bytes = statistics.median(rates), rows[0]["loaded_bytes"]
    sources = json.dumps(rows[0]["sources"][0]).strip("{}").replace('"', "")
    return (
        f"{num_bytes / 1e6:.0f} MB at {rate / 1e9:.2f} GB/s, {rate / plain:.0%} of a plain read "
        f"({sources})"
    )


def _print_phases(console: Console, rounds: Sequence[Round]) -> None:
    table = Table(title="phases, milliseconds, medians (a second line: the second change of epoch)")
    for column in ("scenario", *PHASES):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for scenario in SCENARIOS:
        rows = [r for r in rounds if r["scenario"] == scenario.name]
        for turn in range(min(len(r["phases"]) for r in rows)):
            cells = [
                f"{statistics.median(r['phases'][turn][p] for r in rows) * 1e3:.1f}" for p in PHASES
            ]
            table.add_row(scenario.name if not turn else "", *cells)
    console.print(table)


def _print_restarts(console: Console, restarts: Sequence[dict[str, float]]) -> None:
    table = Table(title="restart, seconds, medians, in the paper's categories")
    for column in ("total", *CATEGORIES):
        table.add_column(column, justify="right")
    medians = (statistics.median(r[c] for r in restarts) for c in ("total", *CATEGORIES))
    table.add_row(*(f"{seconds:.2f}" for seconds in medians))
    console.print(table)
