"""`bench recovery`: the paper's table (restart, attention failure, expert failures, collocated).

Each scenario is a deployment of its own; each round of it takes one real SIGKILL under load. Where
the membership is another one afterwards (role switches), each round has a fresh deployment.
"""

import asyncio
import json
import os
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from revivemoe.bench.faultrun import FaultRun, run_with_fault
from revivemoe.bench.loadgen import StreamResult, stream_all
from revivemoe.bench.server_process import ServerProcess
from revivemoe.epochs.record import PHASES

CATEGORIES = (
    "engine", "executor processes", "distributed groups", "XCCL", "role switch",
    "generator", "read cache", "compile", "other",
)  # fmt: skip
"""The paper's. Here: "distributed groups" and "XCCL" are one, the domain, and "read cache" and
"compile" are nothing: there are no compiled graphs."""
LIMITS = "[limits]\nmax_recoveries = 100000\nmax_restarts = 100000\n"


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


def run(model_dir: Path, num_experts: int, load: Load, console: Console) -> dict[str, Any]:
    """Measure; returns the document. Times in seconds."""
    bandwidth = plain_read(model_dir)
    restarts = [_restart(model_dir, num_experts) for _ in range(max(2, load.rounds // 2))]
    rows = []
    for scenario in SCENARIOS:
        rows += _rounds(model_dir, num_experts, scenario, load, bandwidth, console)
    document = {
        "cores": len(os.sched_getaffinity(0)),
        "plain_read_bytes_per_s": bandwidth,
        "restarts": restarts,
        "rounds": rows,
    }
    _print(console, document)
    return document


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


# ---- rounds ------------------------------------------------------------------------------------


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
) -> list[dict[str, Any]]:
    flags, draw = _flags(model_dir, num_experts, scenario), random.Random(scenario.name)
    rows: list[dict[str, Any]] = []
    while len(rows) < load.rounds:
        with ServerProcess(model_dir, flags) as server:
            bodies = _bodies(model_dir, load, draw)
            asyncio.run(stream_all(server.url, bodies, timeout_s=300))  # warm-up
            calm = asyncio.run(stream_all(server.url, bodies, timeout_s=300))
            count = 1 if scenario.fresh else load.rounds
            for _ in range(count):
                rows.append(_round(server, scenario, load, calm, bodies, bandwidth, draw))
                console.print(_line(rows[-1], len(rows), load.rounds))
    return rows


def _bodies(model_dir: Path, load: Load, draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "model": model_dir.name,
            "prompt": [draw.randrange(16, 500) for _ in range(load.prompt_tokens)],
            "max_tokens": load.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(load.streams)
    ]


def _round(
    server: ServerProcess,
    scenario: Scenario,
    load: Load,
    calm: Sequence[StreamResult],
    bodies: Sequence[dict[str, Any]],
    bandwidth: float,
    draw: random.Random,
) -> dict[str, Any]:
    seen = len(server.status()["recoveries"])
    total = load.streams * load.output_tokens
    strike = partial(server.kill_pid, server.rank_pid(scenario.victim))
    after = draw.randrange(total // 8, total // 2)
    fault = asyncio.run(run_with_fault(server, bodies, lambda: _ignore(strike()), after))
    failed = [r.error for r in fault.results if r.error is not None]
    if failed:
        raise RuntimeError(f"{scenario.name}: a stream failed: {failed[0]}")
    if "background" in scenario.name:
        _await(server, lambda status: not status["experts"]["missing"], "the switch")
    records = server.status()["recoveries"][seen:]
    row = _figures(scenario, calm, fault, records, bandwidth)
    if not scenario.fresh:
        _rejoin(server, scenario.victim)
    return row


def _ignore(_: float) -> None:
    pass


def _figures(
    scenario: Scenario,
    calm: Sequence[StreamResult],
    fault: FaultRun,
    records: Sequence[dict[str, Any]],
    bandwidth: float,
) -> dict[str, Any]:
    gaps = [b - a for r in calm for a, b in zip(r.times, r.times[1:], strict=False)]
    step_s = statistics.median(gaps)
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


def _rejoin(server: ServerProcess, rank: int) -> None:
    body = {"instruction": "rejoin", "params": {"id": rank}}
    url = f"{server.url}/v1/fault_tolerance/apply"
    httpx.post(url, json=body, timeout=10).raise_for_status()
    _await(server, lambda s: s["engines"][rank]["logical_rank"] is not None, "the rejoin")


def _await(server: ServerProcess, holds: Any, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds(status := server.status()) or status["state"] != "serving":
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {timeout_s:.0f} s")
        time.sleep(0.05)


# ---- restart -----------------------------------------------------------------------------------


def _restart(model_dir: Path, num_experts: int) -> dict[str, float]:
    """A full stop and start until it answers, in the paper's categories, seconds."""
    flags = _flags(model_dir, num_experts, SCENARIOS[0])
    body = {"model": model_dir.name, "prompt": [20, 21], "max_tokens": 1}
    with ServerProcess(model_dir, flags) as server:
        began, wall = time.monotonic(), time.time()
        server.stop()
        server.restart()
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        total_s = time.monotonic() - began
        return {"total": total_s, **_categories(server.log_tail(200), wall, total_s)}


def _categories(log: str, wall: float, total_s: float) -> dict[str, float]:
    """What the log tells of a start."""
    listening = _at(log, "listening on") - wall
    warm = float(_found(r"fork server warm after ([\d.]+) s", log))
    weights = max(float(s) for s in re.findall(r"weights in ([\d.]+) s", log))
    spent = {"engine": listening, "executor processes": warm, "generator": weights}
    found = dict.fromkeys(CATEGORIES, 0.0) | spent
    found["other"] = max(0.0, total_s - sum(spent.values()))
    return found


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"the server's log lacks {pattern!r}")
    return match.group(1)


def _at(log: str, what: str) -> float:
    """When a line was logged, seconds since 1970."""
    stamp = _found(rf"(\S+ [\d:]+,\d+) .*{what}", log)
    whole, _, millis = stamp.partition(",")
    return time.mktime(time.strptime(whole, "%Y-%m-%d %H:%M:%S")) + int(millis) / 1e3


# ---- what is told ------------------------------------------------------------------------------


def _line(row: dict[str, Any], number: int, of: int) -> str:
    stalls = ", ".join(f"{s * 1e3:.0f}" for s in row["stalls_s"])
    return f"{row['scenario']}, {number}/{of}: stall {stalls} ms (aim {row['aim_s'] * 1e3:.0f})"


def _print(console: Console, document: dict[str, Any]) -> None:
    restarts = document["restarts"]
    restart_s = statistics.median(r["total"] for r in restarts)
    table = Table(title="the paper's table, milliseconds: median / worst")
    for column in ("scenario", "n", "detection", "stall", "aim", "met", "of a restart", "loaded"):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    table.add_row("restart", str(len(restarts)), "", f"{restart_s * 1e3:.0f}", "", "", "100 %", "")
    for scenario in SCENARIOS:
        rows = [r for r in document["rounds"] if r["scenario"] == scenario.name]
        stall_s = statistics.median(r["stall_s"] for r in rows)
        met = sum(r["stall_s"] <= r["aim_s"] for r in rows)
        table.add_row(
            scenario.name,
            str(len(rows)),
            _pair(rows, "detect_s"),
            _pair(rows, "stall_s"),
            f"{statistics.median(r['aim_s'] for r in rows) * 1e3:.0f}",
            f"{met}/{len(rows)}",
            f"{stall_s / restart_s:.1%}",
            _loaded(rows, document["plain_read_bytes_per_s"]),
        )
    console.print(table)
    _print_phases(console, document)


def _pair(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in rows]
    return f"{statistics.median(values) * 1e3:.0f} / {max(values) * 1e3:.0f}"


def _loaded(rows: Sequence[dict[str, Any]], plain: float) -> str:
    rates = [r["load_bytes_per_s"] for r in rows if r["load_bytes_per_s"]]
    if not rates:
        return ""
    rate, num_bytes = statistics.median(rates), rows[0]["loaded_bytes"]
    sources = json.dumps(rows[0]["sources"][0]).strip("{}").replace('"', "")
    return (
        f"{num_bytes / 1e6:.0f} MB at {rate / 1e9:.2f} GB/s, {rate / plain:.0%} of a plain read "
        f"({sources})"
    )


def _print_phases(console: Console, document: dict[str, Any]) -> None:
    table = Table(title="phases, milliseconds, medians (a second line: the second change of epoch)")
    for column in ("scenario", *PHASES):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for scenario in SCENARIOS:
        rows = [r for r in document["rounds"] if r["scenario"] == scenario.name]
        for turn in range(min(len(r["phases"]) for r in rows)):
            cells = [
                f"{statistics.median(r['phases'][turn][p] for r in rows) * 1e3:.1f}" for p in PHASES
            ]
            table.add_row(scenario.name if not turn else "", *cells)
    console.print(table)
    restart = Table(title="restart, seconds, medians, in the paper's categories")
    for column in ("total", *CATEGORIES):
        restart.add_column(column, justify="right")
    restart.add_row(
        *(
            f"{statistics.median(r[c] for r in document['restarts']):.2f}"
            for c in ("total", *CATEGORIES)
        )
    )
    console.print(restart)
