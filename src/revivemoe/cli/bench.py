"""`revivemoe bench NAME`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from revivemoe.cli.interrupts import cleaned_up

if TYPE_CHECKING:
    from revivemoe.bench import recovery
    from revivemoe.bench.peers import run as peers
    from revivemoe.bench.soak.setup import Setup

Measure = Callable[[], dict[str, object]]

NAMES = ("recovery", "throughput", "dispatch", "overhead", "compile", "peers", "soak")


@dataclass(frozen=True)
class Options:
    """What the command line says; each bench reads what concerns it."""

    preset: str | None
    faults: int
    kinds: str
    contexts: str
    tables: str
    rounds: int
    model: Path | None
    minutes: float
    layout: str
    every: str
    seed: int | None
    comm_backend: str
    streams: str
    ranks: str
    batch_invariant: bool
    others: bool


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    model: Annotated[
        Path | None,
        typer.Argument(help="soak: checkpoint; default: one that is made.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Checkpoint: tiny, small or medium; default: small, for soak tiny."),
    ] = None,
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
        int, typer.Option(help="throughput, compile, peers, recovery's paper table: rounds.")
    ] = 3,
    minutes: Annotated[float, typer.Option(help="soak: how long, over all layouts.")] = 30.0,
    layout: Annotated[str, typer.Option(help="soak: collocated, disaggregated or both.")] = "both",
    every: Annotated[
        str, typer.Option(help="soak: seconds from all being well to the next fault.")
    ] = "10-20",
    seed: Annotated[
        int | None, typer.Option(help="soak: decides the faults; default: any.")
    ] = None,
    comm_backend: Annotated[
        str, typer.Option(help="soak: auto, shm or gloo (which has links to cut).")
    ] = "auto",
    streams: Annotated[
        str, typer.Option(help="peers: requests at once, separated by commas.")
    ] = "1,4,16,64",
    ranks: Annotated[
        str, typer.Option(help="peers: ranks of ours that share the cores, separated by commas.")
    ] = "1",
    batch_invariant: Annotated[
        bool, typer.Option(help="peers: ours once more, with the flag of this name.")
    ] = False,
    others: Annotated[
        bool,
        typer.Option(help="peers: install and serve vLLM's CPU build, or only ours."),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--json", help="JSON file; default: bench-NAME.json."),
    ] = None,
) -> None:
    """Measure on this machine; prints a table and writes JSON. Exit status 1: soak found faults."""
    if name not in NAMES:
        raise ValueError(f"unknown bench {name!r}: choose one of {', '.join(NAMES)}")
    options = Options(
        preset, faults, kinds, contexts, tables, rounds,
        model, minutes, layout, every, seed, comm_backend, streams, ranks,
        batch_invariant, others,
    )  # fmt: skip
    measure = _measure(name, options)
    with cleaned_up():
        document = measure()
        path = out or Path(f"bench-{name}.json")
        _write(path, document)
    typer.echo(f"written to {path}", err=True)
    if document.get("violations"):
        raise typer.Exit(1)
    if document.get("interrupted"):
        raise typer.Exit(130)


def _write(path: Path, document: dict[str, object]) -> None:
    import json

    path.write_text(json.dumps(document, indent=1) + "\n")


def _measure(name: str, options: Options) -> Measure:
    """What the bench of this name will do; everything it needs is imported."""
    from rich.console import Console

    preset = options.preset or "small"
    match name:
        case "recovery":
            from revivemoe.bench import recovery

            return partial(recovery.run, _recovery_setup(preset, options), Console())
        case "throughput":
            from revivemoe.bench import throughput

            setup = throughput.Setup(preset=preset, rounds=options.rounds)
            return partial(throughput.run, setup, Console())
        case "overhead":
            from revivemoe.bench import overhead

            return partial(overhead.run, overhead.Setup(preset=preset), Console())
        case "compile":
            from revivemoe.bench import compile as of_compile

            return partial(
                of_compile.run,
                of_compile.Setup(preset=preset, rounds=options.rounds),
                Console(),
            )
        case "peers":
            from revivemoe.bench.peers import run as peers

            return partial(peers.run, _peers_setup(preset, options), Console())
        case "soak":
            from revivemoe.bench.soak import run as soak

            return partial(soak.run, _soak_setup(options), Console())
        case _:
            from revivemoe.bench import dispatch

            return dispatch.run


def _recovery_setup(preset: str, options: Options) -> "recovery.Setup":
    """Raises ValueError for what is unknown."""
    from revivemoe.bench import recovery

    setup = recovery.Setup(
        preset=preset,
        faults=options.faults,
        kinds=tuple(options.kinds.split(",")),
        contexts=tuple(int(c) for c in options.contexts.split(",")),
        tables=tuple(options.tables.split(",")),
        rounds=options.rounds,
    )
    _check("--tables", setup.tables, recovery.TABLES)
    _check("--kinds", setup.kinds, tuple(recovery.KINDS))
    return setup


def _peers_setup(preset: str, options: Options) -> "peers.Setup":
    """Raises ValueError."""
    from revivemoe.bench.peers import run as peers

    return peers.Setup(
        preset=preset,
        rounds=options.rounds,
        streams=_numbers("--streams", options.streams),
        ranks=_numbers("--ranks", options.ranks),
        batch_invariant=options.batch_invariant,
        peers=options.others,
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Raises ValueError."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{flag}: {text!r} is no list of numbers: write for example 1,16")
    return tuple(int(part) for part in parts)


def _soak_setup(options: Options) -> "Setup":
    """Raises ValueError for what is unknown."""
    import random

    from revivemoe.bench.soak import layouts
    from revivemoe.bench.soak.setup import Setup

    _check("--layout", (options.layout,), layouts.NAMES)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    return Setup(
        model=options.model,
        preset=options.preset or "tiny",
        layout=options.layout,
        minutes=options.minutes,
        every_s=_range("--every", options.every),
        seed=seed,
        backend=options.comm_backend,
    )


def _range(flag: str, text: str) -> tuple[float, float]:
    """Of "10-20", or of one number. Raises ValueError."""
    least, dash, most = text.partition("-")
    try:
        found = float(least), float(most if dash else least)
    except ValueError:
        found = -1.0, -1.0
    if not 0 <= found[0] <= found[1]:
        raise ValueError(f"{flag}: {text!r} is no range of seconds: write for example 10-20")
    return found


def _check(flag: str, asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"{flag}: {unknown[0]!r} is unknown: choose of {', '.join(known)}")
