"""The deterministic simulation of many seeds, with a report on the terminal."""

import logging
import time

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from revivemoe.sim.report import Tally, replay, run_seeds
from revivemoe.sim.run import Result, run_seed

TABLE_WIDTH = 150
"""Wider than some terminals: a table whose heads are cut says nothing."""


def run(numbers: range, verbose: bool) -> bool:
    """Run these seeds and print what came of them; whether no property was violated."""
    logging.getLogger("revivemoe").setLevel(logging.CRITICAL)
    console = Console()
    began = time.monotonic()
    tally = _verbose(numbers, console) if verbose else _quiet(numbers, console)
    _summary(tally, time.monotonic() - began, console)
    return not tally.failing


def _quiet(numbers: range, console: Console) -> Tally:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=len(numbers))

        def on_result(result: Result) -> None:
            progress.advance(task)
            _report_failure(result, console)

        return run_seeds(numbers, on_result)


def _verbose(numbers: range, console: Console) -> Tally:
    tally = Tally()
    for number in numbers:
        result = run_seed(number, trace=lambda line: console.print(line, markup=False))
        console.print(result.trace or f"seed {number}: {result.outcome}", markup=False)
        _report_failure(result, console)
        tally.add(result)
    return tally


def _report_failure(result: Result, console: Console) -> None:
    if result.violation is not None:
        console.print(f"seed {result.seed}: {result.violation}", markup=False, soft_wrap=True)
        console.print(f"  replay: {replay(result.seed)}", markup=False, soft_wrap=True)


def _summary(tally: Tally, wall_s: float, console: Console) -> None:
    Console(width=max(console.width, TABLE_WIDTH)).print(_coverage_table(tally))
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(tally.outcomes.items()))
    console.print(
        f"{tally.seeds} seeds ({outcomes}), {len(tally.failing)} with a violation; "
        f"{tally.steps / tally.seeds:.0f} steps and {tally.virtual_s / tally.seeds:.1f} virtual "
        f"seconds each, {tally.preemptions} preemptions; {60 * tally.seeds / wall_s:.0f} seeds/min",
        soft_wrap=True,
    )


def _coverage_table(tally: Tally) -> Table:
    stages = sorted({stage for _, stage in tally.coverage})
    table = Table("fault", *stages, title="faults by the stage in which they struck")
    for kind in sorted({kind for kind, _ in tally.coverage}):
        table.add_row(kind, *(str(tally.coverage[kind, stage]) for stage in stages))
    return table
