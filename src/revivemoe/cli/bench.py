"""`revivemoe bench NAME`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revivemoe.cli.interrupts import cleaned_up

if TYPE_CHECKING:
    from revivemoe.bench import recovery

Measure = Callable[[], dict[str, object]]

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
    measure = _measure(name, preset, faults, kinds, contexts, tables, rounds)
    with cleaned_up():
        document = measure()
        path = out or Path(f"bench-{name}.json")
        _write(path, document)
    typer.echo(f"written to {path}", err=True)


def _write(path: Path, document: dict[str, object]) -> None:
    import json

    path.write_text(json.dumps(document, indent=1) + "\n")


def _measure(
    name: str, preset: str, faults: int, kinds: str, contexts: str, tables: str, rounds: int
) -> Measure:
    """What the bench of this name will do; everything it needs is imported."""
    from rich.console import Console

    match name:
        case "recovery":
            from revivemoe.bench import recovery

            setup = _recovery_setup(preset, faults, kinds, contexts, tables, rounds)
            return partial(recovery.run, setup, Console())
        case "throughput":
            from revivemoe.bench import throughput

            return partial(
                throughput.run, throughput.Setup(preset=preset, rounds=rounds), Console()
            )
        case "overhead":
            from revivemoe.bench import overhead

            return partial(overhead.run, overhead.Setup(preset=preset), Console())
        case _:
            from revivemoe.bench import dispatch

            return dispatch.run


def _recovery_setup(
    preset: str, faults: int, kinds: str, contexts: str, tables: str, rounds: int
) -> "recovery.Setup":
    """Raises ValueError for what is unknown."""
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
    _check("--kinds", setup.kinds, tuple(recovery.KINDS))
    return setup


def _check(flag: str, asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"{flag}: {unknown[0]!r} is unknown: choose of {', '.join(known)}")
