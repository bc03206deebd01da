"""What `revivemoe bench` makes of its flags."""

import pytest

from revivemoe.cli.bench import _range


@pytest.mark.parametrize(
    ("text", "seconds"), [("10-20", (10, 20)), ("5", (5, 5)), ("0.5-1.5", (0.5, 1.5))]
)
def test_a_range_of_seconds(text: str, seconds: tuple[float, float]) -> None:
    assert _range("--every", text) == seconds


@pytest.mark.parametrize("text", ["", "x", "20-10", "-5", "1-2-3", "5-"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no range of seconds"):
        _range("--every", text)
