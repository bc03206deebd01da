"""`revivemoe demo`."""

from typing import Annotated

import typer


def demo(
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16: any prompts, each row's bits its own (--batch-invariant; needs a C++ "
            "compiler, once); float32: prompts whose margins are wide; auto: what can be had."
        ),
    ] = "auto",
) -> None:
    """Make a model, serve it on 4 ranks, kill one under 16 streams, compare with no fault."""
    from revivemoe.cli import demo_run

    if dtype not in demo_run.DTYPES:
        raise ValueError(f"--dtype {dtype!r}: choose one of {', '.join(demo_run.DTYPES)}")
    raise typer.Exit(0 if demo_run.run(dtype) else 1)
