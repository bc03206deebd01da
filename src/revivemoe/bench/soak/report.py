"""What a soak has shown: as tables, and as JSON."""

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from revivemoe.bench.soak.episode import Episode
from revivemoe.bench.soak.resources import BOUNDS, begin_and_end
from revivemoe.bench.soak.soak import Soaked


def show(console: Console, soaked: Sequence[Soaked], interrupted: bool = False) -> None:
    for one in soaked:
        console.print(_faults(one))
        console.print(_resources(one))
        for line in totals(one):
            console.print(line, highlight=False, soft_wrap=True)
    lines = violations(soaked)
    for line in lines:
        console.print(f"[red]violated[/red] {line}", highlight=False, soft_wrap=True)
    verdict = f"{len(lines)} violations" if lines else "all is well"
    console.print(f"[bold]{'interrupted; so far: ' if interrupted else ''}{verdict}[/bold]")


def violations(soaked: Sequence[Soaked]) -> list[str]:
    return [f"{one.layout}: {line}" for one in soaked for line in one.violations.lines]


def by_kind(episodes: Sequence[Episode]) -> Mapping[str, list[Episode]]:
    names = sorted({episode.kind for episode in episodes})
    return {name: [e for e in episodes if e.kind == name] for name in names}


def _faults(one: Soaked) -> Table:
    table = Table(title=f"{one.layout}: faults, seconds (median / worst)")
    for column in ("kind", "n", "recovered in", "all back in", "asked back"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, episodes in by_kind(one.episodes).items():
        recovered = _spread([e.recovered_s for e in episodes])
        well, asked = _spread([e.well_s for e in episodes]), sum(e.asked_back for e in episodes)
        table.add_row(kind, str(len(episodes)), recovered, well, str(asked or ""))
    return table


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}"


def _resources(one: Soaked) -> Table:
    table = Table(title=f"{one.layout}: resources, begin / end (medians)")
    table.add_column("of")
    for name in BOUNDS:
        table.add_column(name, justify="right")
    begin, end = begin_and_end(one.samples)
    for role in begin:
        pairs = [(getattr(begin[role], name), getattr(end[role], name)) for name in BOUNDS]
        table.add_row(role, *(f"{was:.0f} / {now:.0f}" for was, now in pairs))
    return table


def totals(one: Soaked) -> list[str]:
    """One line each."""
    tally, accused = one.tally, [a for e in one.episodes for a in e.unprovoked]
    return [
        f"{len(one.episodes)} faults in {one.seconds / 60:.1f} minutes",
        f"{tally.done} requests ({tally.tokens} tokens), {tally.failed} failed, "
        f"{tally.wrong} wrong; longest silence of a stream {tally.worst_gap_s:.2f} s",
        *(f"accused although nobody had touched it: {line}" for line in accused),
    ]


def document(
    soaked: Sequence[Soaked], setup: Mapping[str, object], interrupted: bool
) -> dict[str, object]:
    return {
        "bench": "soak",
        "setup": dict(setup),
        "interrupted": interrupted,
        "layouts": [_layout(one) for one in soaked],
        "violations": violations(soaked),
    }


def _layout(one: Soaked) -> dict[str, object]:
    begin, end = begin_and_end(one.samples)
    return {
        "layout": one.layout,
        "seconds": one.seconds,
        "requests": vars(one.tally),
        "faults": [vars(episode) for episode in one.episodes],
        "begin": {role: vars(usage) for role, usage in begin.items()},
        "end": {role: vars(usage) for role, usage in end.items()},
        "segments": one.segments,
    }
