"""What the flags of `serve` say and take."""

from typing import get_type_hints

from revivemoe.cli.serve import serve


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
