"""The command line answers at once: what says no more than help loads no more than help needs."""

import json
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "zmq", "fastapi", "uvicorn",
    "httpx", "psutil", "asyncio", "msgspec", "prometheus_client",
)  # fmt: skip
COMMANDS = ("make-model", "serve", "demo", "bench", "sim")

LISTING = """
import json, sys
from revivemoe.cli.main import main
try:
    main()
finally:
    json.dump(sorted(sys.modules), sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[str, list[str]]:
    """What a command line prints, and the modules it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout, json.loads(done.stderr)


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help_loads_no_library_but_those_that_print_it(arguments: list[str]) -> None:
    out, modules = loaded_by(*arguments)
    assert "Usage: " in out
    assert not {name for name in modules if name.split(".")[0] in HEAVY}
    assert {name for name in modules if name.startswith("revivemoe.")} == {
        "revivemoe.cli",
        "revivemoe.cli.main",
        "revivemoe.cli.app",
        "revivemoe.cli.at_once",
        "revivemoe.cli.bench",
        "revivemoe.cli.demo",
        "revivemoe.cli.interrupts",
        "revivemoe.cli.make_model",
        "revivemoe.cli.precompile",
        "revivemoe.cli.serve",
        "revivemoe.cli.sim",
    }


def test_the_version() -> None:
    out, modules = loaded_by("--version")
    assert out == f"revivemoe {version('revivemoe')}\n"
    assert "rich" not in modules
    assert not {name for name in modules if name.split(".")[0] in HEAVY}


def test_the_entry_point_loads_next_to_nothing() -> None:
    """While it is imported, Ctrl-C is still an exception."""
    code = "import sys, signal; before = set(sys.modules); import revivemoe.cli.main as _; "
    code += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first = ["revivemoe", "revivemoe.cli", "revivemoe.cli.at_once", "revivemoe.cli.main"]
    assert done.stdout.split() == first


STRUCK = """
import signal, sys
from revivemoe.cli.main import main

moment = sys.argv.pop(1)

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Strike())
main()
"""
"""Ctrl-C the moment a module is about to be loaded."""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("revivemoe.cli.app", ["--help"]),
        ("typer.main", ["--help"]),
        ("revivemoe.config", ["serve", "x"]),
        ("revivemoe.sim.run", ["sim"]),
        ("httpx", ["demo"]),
        ("revivemoe.bench.dispatch", ["bench", "dispatch"]),
    ],
)
def test_ctrl_c_while_a_module_is_loaded(module: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRUCK, module, *arguments], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
