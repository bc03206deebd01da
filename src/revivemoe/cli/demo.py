"""`revivemoe demo`."""

import typer


def demo() -> None:
    """Make a model, serve it on 4 ranks, kill one under 16 streams, compare with no fault."""
    from revivemoe.cli import demo_run

    raise typer.Exit(0 if demo_run.run() else 1)
