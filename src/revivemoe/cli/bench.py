"""`revivemoe bench NAME`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

NAMES = ("recovery", "throughput", "dispatch", "overhead")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    preset: Annotated[str, typer.Option(help="Checkpoint: tiny, small or medium.")] = "small",
    faults: Annotated[
        int, typer.Option(help="recovery: faults of each kind; fewer at long contexts.")
    ] = 20,
    kinds: Annotated[
        str, typer.Option(help="recovery: kinds of fault, separated by commas.")
    ] = "kill,stop,hang,error,nan,drain",
    contexts: Annotated[
        str, typer.Option(help="recovery: prompt tokens, separated by commas.")
    ] = "64,500,2000",
    tables: Annotated[
        str, typer.Option(help="recovery: paper, kinds, or both separated by a comma.")
    ] = "paper,kinds",
    rounds: Annotated[
        int, typer.Option(help="throughput, recovery's paper table: rounds of each.")
    ] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: bench-NAME.json.")] = None,
) -> None:
    """Measure on this machine; prints a table and writes JSON."""
    if name not in NAMES:
        raise ValueError(f"unknown bench {name!r}: choose one of {', '.join(NAMES)}")
    document = _run(name, preset, faults, kinds, contexts, tables, rounds, Console())
    path = out or Path(f"bench-{name}.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    typer.echo(f"written to {path}", err=True)


def _run(
    name: str,
    preset: str,
    faults: int,
    kinds: str,
    contexts: str,
    tables: str,
    rounds: int,
    console: Console,
) -> dict[str, object]:
    match name:
        case "recovery":
            from revivemoe.bench import recovery

            setup = recovery.Setup(
                preset=preset,
                faults=faults,
                kinds=tuple(kinds.split(",")),
                contexts=tuple(int(c) for c in contexts.split(",")),
                tables=tuple(tables.split(",")),
                rounds=rounds,
            )
            _check("--tables", setup.tables, recovery.TABLES)
            _check("--kinds", setup.kinds, recovery.KINDS)
            return recovery.run(setup, console)
        case "throughput":
            from revivemoe.bench import throughput

            return throughput.run(throughput.Setup(preset=preset, rounds=rounds), console)
        case "overhead":
            from revivemoe.bench import overhead

            return overhead.run(overhead.Setup(preset=preset), console)
        case _:
            from revivemoe.bench import dispatch

            return dispatch.run()


def _check(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{option}: {unknown[0]!r} is unknown: choose of {', '.join(known)}")
