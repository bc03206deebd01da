"""`revivemoe bench NAME`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

NAMES = ("recovery", "throughput", "dispatch")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    preset: Annotated[str, typer.Option(help="Checkpoint: tiny, small or medium.")] = "small",
    kills: Annotated[int, typer.Option(help="recovery: kills, each on a fresh deployment.")] = 10,
    rounds: Annotated[int, typer.Option(help="throughput: alternating rounds.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: bench-NAME.json.")] = None,
) -> None:
    """Measure on this machine; prints a table and writes JSON."""
    if name not in NAMES:
        raise ValueError(f"unknown bench {name!r}: choose one of {', '.join(NAMES)}")
    document = _run(name, preset, kills, rounds, Console())
    path = out or Path(f"bench-{name}.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    typer.echo(f"written to {path}", err=True)


def _run(name: str, preset: str, kills: int, rounds: int, console: Console) -> dict[str, Any]:
    match name:
        case "recovery":
            from revivemoe.bench import recovery

            return recovery.run(recovery.Setup(preset=preset, kills=kills), console)
        case "throughput":
            from revivemoe.bench import throughput

            return throughput.run(throughput.Setup(preset=preset, rounds=rounds), console)
        case _:
            from revivemoe.bench import dispatch

            return dispatch.run()
