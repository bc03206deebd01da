"""What the flags of `serve` say and take."""

from pathlib import Path
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from revivemoe.cli import serve_run
from revivemoe.cli.app import app
from revivemoe.cli.serve import serve
from revivemoe.config import EngineConfig


def help_of(flag: str) -> str:
    annotated = get_type_hints(serve, include_extras=True)[flag]
    return str(annotated.__metadata__[0].help)


def test_who_stops_the_server_is_told_to_wait_longer_than_the_streams_have() -> None:
    said = help_of("shutdown_timeout")
    assert "terminationGracePeriodSeconds" in said
    assert "docker stop -t" in said
    assert "10 s" in said


def test_a_template_on_the_command_line_stays_as_it_is() -> None:
    """A path would lose its double slashes."""
    assert get_type_hints(serve)["chat_template"] == str | None


@pytest.mark.parametrize("flag", ["--start-timeout", "--timeout-keep-alive"])
@pytest.mark.parametrize("seconds", ["0", "-1", "86401", "inf", "nan"])
def test_seconds_out_of_range_are_one_line(flag: str, seconds: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), f"{flag}={seconds}"])
    assert isinstance(done.exception, ValueError)
    assert f"{flag} {seconds} is out of range: 1 to 86400 seconds" in str(done.exception)


def test_the_start_may_take_as_long_as_one_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[EngineConfig] = []
    monkeypatch.setattr(serve_run, "run", lambda config, listen: asked.append(config) or 0)
    CliRunner().invoke(app, ["serve", str(tmp_path), "--start-timeout", "1800"])
    CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert [config.start_timeout_s for config in asked] == [1800.0, 600.0]
