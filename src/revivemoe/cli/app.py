"""The commands, and how they fail: one line and exit status 2 for bad input.

Modules of commands import no library but typer; what a command needs is imported when it runs.
"""

import sys
from typing import Annotated

import typer

import revivemoe
from revivemoe.cli.bench import bench
from revivemoe.cli.demo import demo
from revivemoe.cli.make_model import make_model_command
from revivemoe.cli.precompile import precompile
from revivemoe.cli.serve import serve
from revivemoe.cli.sim import sim

app = typer.Typer(
    name="revivemoe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("make-model")(make_model_command)
app.command("serve")(serve)
app.command("precompile")(precompile)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("sim")(sim)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"revivemoe {revivemoe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Serve Mixture-of-Experts models and recover from device failures in place."""


def run() -> None:
    """Run the command asked for. Bad input ends with one line, never with a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"revivemoe: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
