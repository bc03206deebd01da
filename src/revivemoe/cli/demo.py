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
    graphs: Annotated[
        bool, typer.Option("--graphs", help="In graph mode (float32): nothing is compiled anew.")
    ] = False,
) -> None:
    """Make a model, serve it on 4 ranks, kill one under 16 streams, compare with no fault."""
    from revivemoe.cli import demo_run

    if dtype not in demo_run.DTYPES:
        raise ValueError(f"--dtype {dtype!r}: choose one of {', '.join(demo_run.DTYPES)}")
    if graphs and dtype == "bfloat16":
        raise ValueError("--graphs excludes --dtype bfloat16: a compiler decides how it adds up")
    raise typer.Exit(0 if demo_run.run("float32" if graphs else dtype, graphs) else 1)
