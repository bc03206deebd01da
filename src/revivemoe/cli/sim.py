"""`revivemoe sim`."""

from typing import Annotated

import typer

from revivemoe.cli.interrupts import cleaned_up


def sim(
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    verbose: Annotated[bool, typer.Option(help="Every event of every seed.")] = False,
) -> None:
    """Run the engine and its ranks under random faults, in one thread and in virtual time."""
    from revivemoe.cli import sim_run

    with cleaned_up():
        holds = sim_run.run(range(seed, seed + seeds), verbose)
    raise typer.Exit(0 if holds else 1)
