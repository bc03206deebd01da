"""Whatever is wrong with the place for compiled code, a rank runs; an expert rank wants none."""

import tempfile
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from unit.rank_specs import SPEC

from revivemoe.executor.main import _compile
from revivemoe.model.runner import ModelRunner


class Runner:
    """Says what it was asked for."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def compile(self) -> str:
        self.done.append("compile")
        return "2 in 1.0 s"

    def run_eagerly(self) -> None:
        self.done.append("eagerly")


def told(runner: Runner, **of_spec: Any) -> str:
    return _compile(msgspec.structs.replace(SPEC, **of_spec), cast(ModelRunner, runner))


def test_graphs_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    runner = Runner()
    assert told(runner) == ""
    assert not runner.done
    assert told(runner, in_graphs=True, compile_cache=(str(tmp_path / "a"),)) == "2 in 1.0 s"
    assert runner.done == ["compile"]


def test_without_any_place_it_runs_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    runner = Runner()
    assert told(runner, in_graphs=True, compile_cache=()).startswith("none: ")
    assert runner.done == ["eagerly"]


def test_an_expert_rank_waits_for_nobody_who_compiles(tmp_path: Path) -> None:
    runner, folder = Runner(), tmp_path / "a"
    given = {"in_graphs": True, "attention": False, "compile_cache": (str(folder),)}
    assert told(runner, **given) == "none: no attention"
    assert not runner.done
    assert not folder.exists()
