"""Limits of open files: raised where they may be, and shared out."""

import resource

import pytest

from revivemoe.host import descriptors
from revivemoe.host.descriptors import CEILING, for_clients_below, lowest_free, raise_limit

NO_LIMIT = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "asked_for"),
    [
        (160, 160, 160, None),
        (160, 4096, 4096, (4096, 4096)),
        (1024, 1 << 30, CEILING, (CEILING, 1 << 30)),
        (1024, NO_LIMIT, CEILING, (CEILING, NO_LIMIT)),
        (NO_LIMIT, NO_LIMIT, CEILING, None),
        (CEILING + 1, CEILING + 1, CEILING + 1, None),
    ],
)
def test_the_soft_limit_is_raised_to_the_hard_one(
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    raised: int,
    asked_for: tuple[int, int] | None,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda which, to: asked.append(to))
    assert raise_limit() == raised
    assert asked == ([asked_for] if asked_for else [])


def test_what_clients_leave() -> None:
    assert for_clients_below(160, num_ranks=4, channels=1) == 160 - 72
    with pytest.raises(ValueError, match=r"may open 64 files \(ulimit -n\): 4 ranks need at"):
        for_clients_below(64, num_ranks=4, channels=1)


def test_the_lowest_free_number_tells_how_many_are_in_use() -> None:
    before = lowest_free()
    with open("/dev/null"):
        assert lowest_free() > before
    assert lowest_free() == before
