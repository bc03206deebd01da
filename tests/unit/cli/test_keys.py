"""Keys that are none, or that no client could send, are refused before anything is loaded."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from revivemoe.cli.app import app


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
@pytest.mark.parametrize("key", ["", "schlüssel", "with\nline", " around ", "\t"])
def test_it_is_one_line(flag: str, key: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), flag, key])
    assert isinstance(done.exception, ValueError)
    assert flag in str(done.exception)
    assert "\n" not in str(done.exception)
    if not key:
        assert "leave the flag out" in str(done.exception)


def test_any_other_is_a_key(tmp_path: Path) -> None:
    """What is wrong then is the checkpoint."""
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--api-key", "sk-a b~!"])
    assert "config.json" in str(done.exception)
