"""Rounds of all systems, one after another, so that what the machine does hits all of them."""

import asyncio
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revivemoe.bench.loadgen import StreamResult, greedy, random_prompts, stream_all
from revivemoe.bench.models import bench_model
from revivemoe.bench.peers.environment import provide
from revivemoe.bench.peers.machine import foreign_cores, read, tree_pss_mb
from revivemoe.bench.peers.rounds import Round, Summary, of_streams, summarise
from revivemoe.bench.peers.systems import System, ours, peer
from revivemoe.bench.server_process import ServerProcess

ROUND_WITHIN_S = 300.0
SETTLED_S = 2.0
"""Whoever has served the round before looks out for more for a while, and not asleep."""


@dataclass(frozen=True)
class Setup:
    preset: str = "small"
    rounds: int = 3
    streams: tuple[int, ...] = (1, 4, 16, 64)
    prompt_tokens: int = 64
    output_tokens: int = 128
    ranks: tuple[int, ...] = (1,)
    batch_invariant: bool = False
    """Ours once more, with the flag of that name: what it costs."""
    peers: bool = True
    """Or ours alone, without anything to be installed."""


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Measure; returns the document that is also written as JSON. Raises RuntimeError."""
    environment = provide(console) if setup.peers else None
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder, ExitStack() as stack:
        model_dir, _ = bench_model(Path(folder), setup.preset, "bfloat16", console)
        systems = [ours(model_dir, ranks) for ranks in setup.ranks]
        if setup.batch_invariant:
            systems += [ours(model_dir, ranks, ("--batch-invariant",)) for ranks in setup.ranks]
        if environment is not None:
            systems += [peer(environment, model_dir, eager) for eager in (True, False)]
        servers: list[tuple[System, ServerProcess]] = []
        for system in systems:
            console.print(f"starting {system.name} ...")
            servers.append((system, stack.enter_context(system.start())))
        rounds = _all_rounds(setup, servers, model_dir, console)
    summaries = summarise(rounds)
    _print(console, summaries)
    return {
        "bench": "peers",
        "setup": asdict(setup),
        "machine": _machine(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": [{**asdict(each), "disturbed": each.disturbed} for each in rounds],
        "medians": [asdict(summary) for summary in summaries],
    }


def _all_rounds(
    setup: Setup,
    servers: Sequence[tuple[System, ServerProcess]],
    model_dir: Path,
    console: Console,
) -> list[Round]:
    """The first of each is not counted: what is compiled or measured on first use is ready then."""
    draw, rounds = random.Random(0), []
    for number in range(setup.rounds + 1):
        for streams in setup.streams:
            for system, server in servers:
                one = _round(setup, system, server, model_dir, streams, draw)
                console.print(_line(number, setup.rounds, one))
                rounds += [one] if number else []
    return rounds


def _round(
    setup: Setup,
    system: System,
    server: ServerProcess,
    model_dir: Path,
    streams: int,
    draw: random.Random,
) -> Round:
    """Prompts are new each time, so that no prefix cache knows them."""
    prompts = random_prompts(draw, streams, setup.prompt_tokens)
    bodies = greedy(model_dir, prompts, setup.output_tokens)
    time.sleep(SETTLED_S)
    before = read(server.pid)
    results = asyncio.run(stream_all(server.url, bodies, timeout_s=ROUND_WITHIN_S))
    after = read(server.pid)
    _check(system, results, setup.output_tokens)
    foreign, cpu_s = foreign_cores(before, after), after.own_s - before.own_s
    return of_streams(system.name, results, cpu_s, tree_pss_mb(server.pid), foreign)


def _check(system: System, results: Sequence[StreamResult], tokens: int) -> None:
    """Raises RuntimeError."""
    for result in results:
        if result.error is not None or len(result.token_ids) != tokens:
            said = result.error or f"{len(result.token_ids)} tokens instead of {tokens}"
            raise RuntimeError(f"{system.name}: a stream ended with {said}")


def _line(number: int, rounds: int, one: Round) -> str:
    which = f"round {number}/{rounds}" if number else "warm-up"
    told = f", disturbed: {one.foreign_cores:.2f} cores" if one.disturbed else ""
    return f"{which}: {one.system}, {one.streams} streams: {one.tokens_per_s:.0f} tokens/s{told}"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(": ", 1)[1] for line in lines if line.startswith("model name")}
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{', '.join(sorted(names)) or platform.machine()} ({' '.join(known)})"


def _print(console: Console, summaries: Sequence[Summary]) -> None:
    table = Table(title="medians over rounds that nobody disturbed")
    columns = (
        "streams", "system", "rounds", "tokens/s", "least", "most", "ttft s", "worst", "gap ms",
        "p99", "cpu ms/token", "pss MB",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for s in summaries:
        table.add_row(
            str(s.streams), s.system, f"{s.counted}/{s.rounds}", f"{s.tokens_per_s:.0f}",
            f"{s.least:.0f}", f"{s.most:.0f}", f"{s.ttft_s:.2f}", f"{s.ttft_worst_s:.2f}",
            f"{s.gap_s * 1e3:.0f}", f"{s.gap_p99_s * 1e3:.0f}", f"{s.cpu_per_token_s * 1e3:.2f}",
            f"{s.pss_mb:.0f}",
        )  # fmt: skip
    console.print(table)
