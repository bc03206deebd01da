import signal

import pytest

from revivemoe.executor.injection import Injections
from revivemoe.messages import Inject


@pytest.fixture
def strikes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals this process would have got."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    return raised


def armed(**at: int | str) -> Injections:
    injections = Injections()
    injections.add(Inject("x", "kill", **at))  # type: ignore[arg-type]
    return injections


def test_without_a_moment_it_strikes_now(strikes: list[int]) -> None:
    armed()
    assert strikes == [signal.SIGKILL]


@pytest.mark.parametrize(
    ("at", "before", "there"),
    [
        ({"step": 3}, [(2, "commit", -1)], (3, "schedule", -1)),
        ({"phase": "combine"}, [(0, "dispatch", 1), (1, "commit", -1)], (1, "combine", 0)),
        ({"layer": 2, "phase": "experts"}, [(0, "experts", 1)], (0, "experts", 2)),
        (
            {"step": 3, "layer": 2, "phase": "experts"},
            [(2, "experts", 2), (3, "experts", 1), (3, "dispatch", 2)],
            (3, "experts", 2),
        ),
        ({"step": 3, "layer": 2, "phase": "sample"}, [(3, "combine", 2)], (3, "sample", -1)),
    ],
)
def test_it_strikes_there_and_not_before(
    strikes: list[int],
    at: dict[str, int | str],
    before: list[tuple[int, str, int]],
    there: tuple[int, str, int],
) -> None:
    injections = armed(**at)
    for point in before:
        injections.reached(*point)
    assert strikes == []
    injections.reached(*there)
    assert strikes == [signal.SIGKILL]


def test_a_step_just_missed_does_not_disarm_it(strikes: list[int]) -> None:
    armed(step=3, phase="attention").reached(5, "attention", -1)
    assert strikes == [signal.SIGKILL]


def test_it_strikes_once(strikes: list[int]) -> None:
    injections = armed(step=3)
    for _ in range(3):
        injections.reached(3, "schedule", -1)
    assert strikes == [signal.SIGKILL]


def test_two_faults_are_two(strikes: list[int]) -> None:
    injections = armed(step=3)
    injections.add(Inject("y", "kill", step=4))
    injections.reached(3, "schedule", -1)
    assert len(strikes) == 1
    injections.reached(4, "schedule", -1)
    assert len(strikes) == 2


def test_a_kind_nobody_can_produce(strikes: list[int]) -> None:
    injections = Injections()
    with pytest.raises(AssertionError, match="unknown kind of fault 'flood'"):
        injections.add(Inject("x", "flood"))
    assert strikes == []
