"""The dependencies between the packages, as docs/structure.md draws them, enforced.

Every rule is a row of a table; a walk over the syntax trees finds what each module imports, at
module level (it is paid and needed by whoever imports the module) and inside functions.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import revivemoe

ROOT = Path(revivemoe.__file__).parent


@dataclass
class Module:
    """What one file imports and calls."""

    name: str
    at_import: set[str] = field(default_factory=set)
    """Dotted names imported when the module is."""
    in_functions: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    """Dotted attribute chains that occur, such as `os.kill`."""

    @property
    def imports(self) -> set[str]:
        return self.at_import | self.in_functions


def parse(name: str, source: str) -> Module:
    module = Module(name)
    for node, inside in walk(ast.parse(source), False):
        into = module.in_functions if inside else module.at_import
        match node:
            case ast.Import(names=aliases):
                into.update(alias.name for alias in aliases)
            case ast.ImportFrom(module=base, names=aliases, level=0) if base:
                into.add(base)
                into.update(f"{base}.{alias.name}" for alias in aliases)
                module.names.update(f"{base}.{alias.name}" for alias in aliases)
            case ast.ImportFrom():
                raise AssertionError(f"{name}: relative imports are not used here")
            case ast.Attribute():
                module.names.add(ast.unparse(node))
            case _:
                pass
    return module


def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it lies in a function. What is only for the type checker is not."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node, inside
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, inside)


def read_package() -> dict[str, Module]:
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = parse(name, path.read_text())
    return modules


MODULES = read_package()


def modules_of(*packages: str) -> list[Module]:
    """The modules in these packages, named without the leading `revivemoe`."""
    missing = [p for p in packages if f"{ROOT.name}.{p}" not in MODULES]
    assert not missing, f"{missing} name no module"
    return [m for m in MODULES.values() if within(m.name, packages)]


def within(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"revivemoe.{package}.") for package in packages)


def ours(names: Iterable[str]) -> set[str]:
    """Modules of the package that these imports load: the modules and the packages around them."""
    loaded: set[str] = set()
    for name in names:
        parts = name.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        loaded |= prefixes & MODULES.keys()
    return loaded


def reached(module: Module, also_functions: bool) -> set[str]:
    """All modules of the package that importing this one loads, itself included."""
    seen: set[str] = set()
    todo = [module.name]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        found = MODULES[name]
        todo.extend(ours([name, *(found.imports if also_functions else found.at_import)]))
    return seen


def uses(names: Iterable[str], forbidden: Iterable[str]) -> set[str]:
    """Those of `names` that are one of `forbidden`, or lie below one."""
    return {n for n in names if any(f"{n}.".startswith(f"{f}.") for f in forbidden)}


def loads(module: Module, libraries: Iterable[str]) -> set[str]:
    """How importing this module loads one of the libraries: 'our module -> library'."""
    return {
        f"{name} -> {library}"
        for name in reached(module, also_functions=False)
        for library in uses(MODULES[name].at_import, libraries)
    }


HEAVY = ("torch", "transformers", "safetensors", "zmq")

TORCH_FREE = modules_of(
    *("ids", "sampling_params", "membership", "messages"),
    *("core", "recovery", "epochs", "engine", "sim"),
)


@pytest.mark.parametrize("module", TORCH_FREE, ids=lambda m: m.name)
def test_the_control_plane_needs_no_torch(module: Module) -> None:
    assert not loads(module, HEAVY)
    assert not uses(module.in_functions, HEAVY)


@pytest.mark.parametrize(
    ("ground", "allowed"),
    [
        ("ids", ()),
        ("sampling_params", ()),
        ("host", ()),
        ("membership", ("ids",)),
        ("messages", ("ids", "sampling_params", "membership")),
    ],
)
def test_the_ground_reaches_nothing_above_itself(ground: str, allowed: tuple[str, ...]) -> None:
    for module in modules_of(ground):
        found = reached(module, also_functions=True) - {ROOT.name}
        wrong = {n for n in found if not within(n, (ground, *allowed))}
        assert not wrong, f"{module.name} reaches {sorted(wrong)}"


RANK = ("comm", "model", "executor")
"""What runs in a rank with torch, beside `core`."""

HOSTS = ("serving", "server", "cluster", "sim")
"""What drives an engine: real processes and the API, or the simulation."""

WALLS = {
    ("recovery",): ("epochs", "engine", "core", *RANK, *HOSTS),
    ("epochs",): ("engine", "core", *RANK, *HOSTS),
    ("engine",): (*RANK, *HOSTS),
    ("core",): ("recovery", "epochs", "engine", *RANK, *HOSTS),
    RANK: ("recovery", "epochs", "engine", *HOSTS),
    ("server",): ("recovery", "epochs", "engine", "cluster", *RANK),
    ("sim",): ("cluster", *RANK),
}
"""Packages, and those that they may not reach, be it through others or inside a function."""


@pytest.mark.parametrize(("packages", "forbidden"), WALLS.items(), ids="-".join)
def test_who_may_import_whom(packages: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert modules_of(*forbidden), "a wall against what there isn't holds nothing"
    wrong = {
        f"{module.name} reaches {other}"
        for module in modules_of(*packages)
        for other in reached(module, also_functions=True)
        if within(other, forbidden)
    }
    assert not wrong, "\n".join(sorted(wrong))


PROCESSES = (
    "subprocess",
    "multiprocessing",
    "concurrent.futures.ProcessPoolExecutor",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.posix_spawnp",
    "os.system",
    "os.popen",
    "os.kill",
    "os.killpg",
    "os.waitpid",
    "os.pidfd_open",
    "signal.pidfd_send_signal",
    "psutil.Process",
    "psutil.Popen",
    "asyncio.create_subprocess_exec",
    "asyncio.create_subprocess_shell",
)
"""Ways to make a process or to signal another. `signal.raise_signal` only ever hits oneself."""

FD_PASSING = {"multiprocessing", "multiprocessing.reduction"}
"""How a descriptor travels in a pickle; no process is started with it."""


def test_only_cluster_touches_processes() -> None:
    """Benches drive an instance from outside, as tests do."""
    for module in MODULES.values():
        if within(module.name, ("cluster", "bench")):
            continue
        found = uses(module.imports | module.names, PROCESSES)
        if module.name == "revivemoe.comm.shm":
            found -= FD_PASSING
        assert not found, f"{module.name} uses {sorted(found)}"


def test_only_comm_touches_process_groups() -> None:
    """The engine hosts the rendezvous store, since it outlives the ranks."""
    for module in MODULES.values():
        if within(module.name, ("comm", "bench", "cluster.store")):
            continue
        assert not uses(module.imports | module.names, ["torch.distributed"]), module.name


ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")


def test_only_config_and_cli_read_the_environment() -> None:
    """`cluster` hands it on to the processes it starts, whole; a bench to those it measures; and
    there is one place that sets variables for libraries.
    """
    for module in MODULES.values():
        used = uses(module.names, ENVIRONMENT)
        if within(module.name, ("config", "cli")):
            continue
        if within(module.name, ("cluster", "bench")):
            assert not {n for n in module.names if n.startswith("os.environ.")}, module.name
            continue
        if module.name == "revivemoe.host.variables":
            assert {n for n in module.names if n.startswith("os.environ.")} == {"os.environ.update"}
            continue
        assert not used, f"{module.name} reads the environment"


# ---- the walk itself ------------------------------------------------------------------------

SAMPLE = """
import os
from typing import TYPE_CHECKING
from revivemoe.core import rank
if TYPE_CHECKING:
    import torch
def f():
    from torch import nn
    os.kill(1, 9)
class C:
    import json
"""


def test_the_walk_sees_levels_and_names() -> None:
    module = parse("sample", SAMPLE)
    assert "torch" not in module.at_import
    assert "torch.nn" in module.in_functions
    assert {"os", "json", "revivemoe.core.rank"} <= module.at_import
    assert "os.kill" in module.names


def test_the_walk_follows_modules_and_packages() -> None:
    driver = MODULES["revivemoe.executor.driver"]
    found = reached(driver, also_functions=False)
    assert {"revivemoe.core.rank", "revivemoe.model.runner", "revivemoe.core"} <= found
    assert any("torch" in path for path in loads(driver, HEAVY))
