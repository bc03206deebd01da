"""`revivemoe`: the commands, and how they fail: one line and exit status 2 for bad input."""

import sys

import typer

from revivemoe.cli.bench import bench
from revivemoe.cli.demo import demo
from revivemoe.cli.make_model import make_model_command
from revivemoe.cli.serve import serve
from revivemoe.cli.sim import sim

app = typer.Typer(
    name="revivemoe",
    help="Serve Mixture-of-Experts models and recover from device failures in place.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("make-model")(make_model_command)
app.command("serve")(serve)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("sim")(sim)


def main() -> None:
    """Entry point. Bad input ends with one line and status 2, never with a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"revivemoe: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
