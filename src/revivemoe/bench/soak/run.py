"""`bench soak`: each layout for its share of the time, and the verdict."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from revivemoe.bench.models import bench_model
from revivemoe.bench.server_process import ServerProcess
from revivemoe.bench.soak import report
from revivemoe.bench.soak.layouts import POLICY, Layout, layouts
from revivemoe.bench.soak.load import Request
from revivemoe.bench.soak.processes import Family
from revivemoe.bench.soak.prompts import screened_requests
from revivemoe.bench.soak.setup import Setup
from revivemoe.bench.soak.soak import Soak, Soaked
from revivemoe.checkpoint.inspect import inspect_checkpoint

ENDS_WITHIN_S = 30.0
GONE_WITHIN_S = 5.0


def run(setup: Setup, console: Console) -> dict[str, object]:
    """Soak; returns the document that is also written as JSON. Ctrl-C ends it, with what is known
    by then.
    """
    console.print(f"seed {setup.seed}")
    soaked: list[Soaked] = []
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="revivemoe-soak-") as folder:
        try:
            _all_layouts(setup, Path(folder), soaked, console)
        except KeyboardInterrupt:
            interrupted = True
    report.show(console, soaked, interrupted)
    return report.document(soaked, {**vars(setup), "model": str(setup.model)}, interrupted)


def _all_layouts(setup: Setup, folder: Path, soaked: list[Soaked], console: Console) -> None:
    model_dir = setup.model or bench_model(folder, setup.preset, "float32", console)[0]
    requests = screened_requests(model_dir, setup.seed)
    chosen = layouts(setup.layout)
    for layout in chosen:
        soaked.append(Soaked(layout.name))
        one = replace(setup, minutes=setup.minutes / len(chosen))
        say = partial(console.print, highlight=False, soft_wrap=True)
        soak_layout(one, model_dir, layout, requests, soaked[-1], say, folder)


def soak_layout(
    setup: Setup,
    model_dir: Path,
    layout: Layout,
    requests: Sequence[Request],
    into: Soaked,
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """One deployment from its start to its end. Its log is kept if something was violated."""
    layout = replace(layout, backend=setup.backend)
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    flags = layout.flags(inspect_checkpoint(model_dir).num_experts, policy)
    with ServerProcess(model_dir, flags) as server:
        say(f"{layout.name}: {len(layout.ranks)} ranks serve at {server.url}")
        soak = Soak(server, requests, setup, into, say)
        asyncio.run(soak.run(layout))
        _end(server, soak.family, into)
        if into.violations.lines:
            say(f"log of the server: {server.save_log(Path(f'soak-{layout.name}.log'))}")


def _end(server: ServerProcess, family: Family, into: Soaked) -> None:
    """Ends as it is told to, and leaves nothing behind."""
    into.violations.during = "the end"
    if status := server.stop(ENDS_WITHIN_S):
        into.violations.add(f"the server ended with status {status}")
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := family.living()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        into.violations.add(f"outlived the server: {', '.join(map(str, left))}")
