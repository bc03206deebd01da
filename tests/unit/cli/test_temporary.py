"""Where temporary files go on a host with a read-only root file system."""

import os
import tempfile

import pytest

from revivemoe.cli import temporary
from revivemoe.cli.temporary import LAST_RESORT, find_temporary_directory


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)


def read_only(monkeypatch: pytest.MonkeyPatch, shm: bool) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(temporary.os, "access", lambda path, mode: shm)


def test_what_can_be_written_is_left_alone() -> None:
    find_temporary_directory()
    assert "TMPDIR" not in os.environ


def test_shared_memory_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    read_only(monkeypatch, shm=True)
    monkeypatch.setenv("TMPDIR", "/read/only")
    find_temporary_directory()
    assert os.environ["TMPDIR"] == LAST_RESORT


def test_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    read_only(monkeypatch, shm=False)
    with pytest.raises(ValueError, match="set TMPDIR"):
        find_temporary_directory()
