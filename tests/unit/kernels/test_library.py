"""Building the kernels: once, by whoever comes first, and a line that says why where it fails."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from revivemoe.cluster.compiler import build, provide_kernels
from revivemoe.config import compilers
from revivemoe.kernels import library
from revivemoe.kernels.choice import choose
from revivemoe.kernels.library import NoKernels

OPEN = """
from revivemoe.cluster.compiler import build, provide_kernels
from revivemoe.config import compilers
from revivemoe.kernels.library import open_library
provide_kernels()
print(open_library()._name)
"""
FAKE = """#!/bin/sh
{act}
"""


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What this process has opened already is not known here, and builds go to a new folder."""
    monkeypatch.setattr(library, "_built", library._Built())
    folder = tmp_path / "cache"
    monkeypatch.setenv("REVIVEMOE_CACHE_DIR", str(folder))
    return folder


def compiler(path: Path, act: str) -> str:
    path.write_text(FAKE.format(act=act))
    path.chmod(0o755)
    return str(path)


def why() -> str:
    provide_kernels()
    with pytest.raises(NoKernels) as caught:
        library.open_library()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in why()


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path, forgetful):
    act = "echo 'kernels.cpp:1: error: what is this' >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", act))
    assert "what is this" in why()
    assert not [path for path in forgetful.iterdir() if path.suffix != ".lock"]


def test_a_compiler_that_does_not_end(monkeypatch, tmp_path, forgetful):
    """Nor what it has started."""
    monkeypatch.setattr("revivemoe.cluster.compiler.BUILT_WITHIN_S", 0.3)
    act = f"sleep 60 & echo $! > {tmp_path}/pid; exec sleep 60"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", act))
    began = time.monotonic()
    assert "longer than 0.3 s" in why()
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() - began < 5
        time.sleep(0.02)


def test_a_compiler_has_so_much_cpu_time_also_where_nobody_waits_for_it(monkeypatch, tmp_path):
    act = "ulimit -t >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", act))
    assert why().endswith("failed: 40")


def test_what_is_built_and_is_no_library(monkeypatch, tmp_path):
    act = 'while [ "$1" != "-o" ]; do shift; done; echo junk > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", act))
    assert "kernels-" in why()


def test_a_folder_that_others_can_write_to(forgetful):
    forgetful.mkdir()
    forgetful.chmod(0o777)
    assert "can be written to by others" in why()


def test_the_next_folder_where_the_first_cannot_be_used(tmp_path, forgetful):
    forgetful.mkdir()
    forgetful.chmod(0o777)
    built = build([forgetful, tmp_path / "other"], compilers())
    assert built.parent == tmp_path / "other"
    assert build([forgetful, tmp_path / "other"], compilers()) == built


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REVIVEMOE_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert "REVIVEMOE_CACHE_DIR" in why()


def test_several_at_once_build_once_and_a_killed_one_holds_nobody(tmp_path, forgetful):
    """The first is killed while its compiler runs; the others wait for its lock and go on."""
    slow = compiler(tmp_path / "slow", f'echo once >> {tmp_path}/log; sleep 1; exec g++ "$@"')
    environment = {**os.environ, "CXX": slow}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", OPEN], env=environment, stdout=subprocess.PIPE, text=True
        )

    first = start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    others = [start(), start()]
    names = {other.communicate(timeout=60)[0] for other in others}
    (name,) = names
    assert name.startswith(str(forgetful))
    assert (tmp_path / "log").read_text().count("once") == 2, "the killed one's, and one of two"
    assert stat.S_IMODE(forgetful.stat().st_mode) == 0o700


def test_the_choice_says_why(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    provide_kernels()
    chosen = choose("auto", cpu, torch.float32)
    assert chosen.native is None
    assert "install g++" in chosen.told
    with pytest.raises(NoKernels):
        choose("native", cpu, torch.float32)
    assert choose("torch", cpu, torch.float32).told == "torch"
    assert "float16" in choose("auto", cpu, torch.float16).told
