"""`bench overhead`: what readiness for faults costs while nothing fails.

CPU time of each part by itself, in this process, times how often a step calls it, over the median
step of a served run: journal, heartbeat, progress counters, and the check for non-finite numbers.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from revivemoe.bench.loadgen import gaps, greedy, random_prompts, warm
from revivemoe.bench.models import bench_model
from revivemoe.bench.server_process import ServerProcess
from revivemoe.checkpoint.inspect import inspect_checkpoint
from revivemoe.core.blocks import BlockPool
from revivemoe.core.journal import Journal
from revivemoe.core.progress import Progress
from revivemoe.core.queues import Queues
from revivemoe.core.sequence import Sequence
from revivemoe.ids import Incarnation, LayerId, RankId, SeqId
from revivemoe.messages.reports import Heartbeat, RankStats
from revivemoe.messages.tokens import SequenceSpec
from revivemoe.model.finite import STAGES, FiniteCheck
from revivemoe.sampling_params import SamplingParams

HEARTBEATS_PER_S = 10
PHASES_PER_LAYER = 4
WAITS_PER_LAYER = 2


@dataclass(frozen=True)
class Setup:
    preset: str = "small"
    ranks: int = 4
    streams: int = 16
    output_tokens: int = 96
    block_size: int = 16


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Measure; returns the document that is also written as JSON. Times in seconds."""
    with tempfile.TemporaryDirectory(prefix="revivemoe-bench-") as folder:
        model_dir, _ = bench_model(Path(folder), setup.preset, "bfloat16", console)
        layers = len(inspect_checkpoint(model_dir).moe_layers)
        hidden = inspect_checkpoint(model_dir).hidden_size
        step_s = _median_step_s(model_dir, setup)
    per_rank = setup.streams // setup.ranks
    clear_s = _cpu_s(Journal(BlockPool(4), Queues()).clear)
    costs = {
        "journal": per_rank * _allocation_s() / setup.block_size + clear_s,
        "heartbeat": _heartbeat_s() * HEARTBEATS_PER_S * step_s,
        "progress": _phase_s() * (PHASES_PER_LAYER * layers + 3)
        + _wait_s() * (WAITS_PER_LAYER * layers + 1),
    }
    check_s = _finite_s(layers, per_rank, hidden)
    _print(console, step_s, costs, check_s)
    return {
        "bench": "overhead",
        "setup": vars(setup),
        "step_s": step_s,
        "per_step_s": costs,
        "share": sum(costs.values()) / step_s,
        "finite_check_s": check_s,
    }


def _median_step_s(model_dir: Path, setup: Setup) -> float:
    prompts = random_prompts(random.Random(0), setup.streams, 64)
    bodies = greedy(model_dir, prompts, setup.output_tokens)
    with ServerProcess(model_dir, ["--data-parallel-size", str(setup.ranks)]) as server:
        return statistics.median(gaps(warm(server.url, bodies)))


def _cpu_s(act: Callable[[], object], calls: int = 2000, rounds: int = 7) -> float:
    """CPU seconds of one call: the median of several rounds."""
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(calls):
            act()
        times.append((time.thread_time() - began) / calls)
    return statistics.median(times)


def _allocation_s() -> float:
    """One block through the journal, undone again so that it can be repeated: an upper bound."""
    queues, pool = Queues(), BlockPool(64)
    params = SamplingParams(seed=0, max_tokens=8)
    sequence = Sequence.from_spec(SequenceSpec(SeqId(0), [1, 2, 3], [], params, 0))
    queues.add(sequence)
    queues.to_running(sequence)
    journal = Journal(pool, queues)

    def act() -> None:
        journal.allocate(sequence)
        journal.roll_back(executed=False)

    return _cpu_s(act)


def _heartbeat_s() -> float:
    """A heartbeat that tells the pace, which only every tenth does: an upper bound."""
    progress, me = _experienced(), (RankId(0), Incarnation(1))
    encoder = msgspec.msgpack.Encoder()

    def act() -> None:
        now, paces = progress.activity(), progress.paces()
        encoder.encode(Heartbeat(*me, progress.count, RankStats(), now, paces))

    return _cpu_s(act)


def _experienced() -> Progress:
    progress = Progress(time.monotonic)
    for phase in ("schedule", "attention", "dispatch", "experts", "combine", "sample", "commit"):
        for rows in (1, 4, 16, 64):
            progress.work(phase, 0, 0, rows)
    return progress


def _phase_s() -> float:
    progress = _experienced()
    return _cpu_s(lambda: progress.work("experts", 3, 7, 16))


def _wait_s() -> float:
    progress = _experienced()

    def act() -> None:
        progress.waits(True)
        progress.waits(False)

    return _cpu_s(act)


def _finite_s(layers: int, tokens: int, hidden: int) -> float:
    """All checks of a step."""
    check = FiniteCheck([LayerId(i) for i in range(layers)], (torch.float32,), torch.device("cpu"))
    hidden_TH = torch.randn(tokens, hidden)

    def act() -> None:
        check.reset()
        for layer in range(layers):
            for stage in STAGES:
                check.note(LayerId(layer), stage, hidden_TH)
        check.first()

    return _cpu_s(act, calls=100)


def _print(console: Console, step_s: float, costs: dict[str, float], check_s: float) -> None:
    table = Table(title=f"CPU time per step; median step {step_s * 1e3:.1f} ms")
    for column in ("part", "microseconds", "share of a step"):
        table.add_column(column, justify="left" if column == "part" else "right")
    parts = costs | {"together": sum(costs.values()), "non-finite check": check_s}
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds * 1e6:.1f}", f"{seconds / step_s:.3%}")
    console.print(table)
