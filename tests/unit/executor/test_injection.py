import signal

import pytest
import torch

from revivemoe.executor.injection import InjectedError, Injections
from revivemoe.messages.commands import Inject


@pytest.fixture
def strikes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals this process would have got."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    return raised


def no_tokens() -> set[int]:
    return set()


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
        injections.reached(*point, no_tokens)
    assert strikes == []
    injections.reached(*there, no_tokens)
    assert strikes == [signal.SIGKILL]


def test_a_step_just_missed_does_not_disarm_it(strikes: list[int]) -> None:
    armed(step=3, phase="attention").reached(5, "attention", -1, no_tokens)
    assert strikes == [signal.SIGKILL]


def test_it_strikes_once(strikes: list[int]) -> None:
    injections = armed(step=3)
    for _ in range(3):
        injections.reached(3, "schedule", -1, no_tokens)
    assert strikes == [signal.SIGKILL]


def test_two_faults_are_two(strikes: list[int]) -> None:
    injections = armed(step=3)
    injections.add(Inject("y", "kill", step=4))
    injections.reached(3, "schedule", -1, no_tokens)
    assert len(strikes) == 1
    injections.reached(4, "schedule", -1, no_tokens)
    assert len(strikes) == 2


def test_a_kind_nobody_can_produce(strikes: list[int]) -> None:
    injections = Injections()
    with pytest.raises(AssertionError, match="unknown kind of fault 'flood'"):
        injections.add(Inject("x", "flood"))
    assert strikes == []


def test_a_fault_that_concerns_a_request_strikes_whenever_it_runs(strikes: list[int]) -> None:
    injections = Injections()
    injections.add(Inject("x", "kill", phase="experts", params={"prompt_token": 77}))
    injections.reached(1, "experts", 0, lambda: {5, 6})
    assert strikes == []
    for _ in range(2):
        injections.reached(1, "experts", 0, lambda: {5, 77})
    assert strikes == [signal.SIGKILL] * 2


def test_an_error_is_raised_there() -> None:
    injections = Injections()
    injections.add(Inject("x", "error", step=2))
    injections.reached(1, "experts", 0, no_tokens)
    with pytest.raises(InjectedError):
        injections.reached(2, "experts", 0, no_tokens)


def test_memory_is_taken_up_to_a_bound() -> None:
    with pytest.raises(InjectedError, match="holds 32 MiB"):
        Injections().add(Inject("x", "memory", params={"mebibytes": 40}))


def test_a_slow_rank_takes_a_multiple_of_its_own_work() -> None:
    injections = Injections()
    assert injections.delay_s("experts", 0.1) == 0.0
    injections.add(Inject("x", "slow", params={"factor": 4}))
    assert injections.delay_s("experts", 0.1) == pytest.approx(0.3)
    only = Injections()
    only.add(Inject("x", "slow", step=1, phase="experts", params={"factor": 4}))
    only.reached(1, "experts", 0, no_tokens)
    assert only.delay_s("combine", 0.1) == 0.0
    assert only.delay_s("experts", 0.1) == pytest.approx(0.3)


def test_nan_is_put_into_what_a_phase_produced_once() -> None:
    injections = Injections()
    injections.add(Inject("x", "nan", step=3, layer=1, phase="experts"))
    values = torch.ones(2, 3)
    assert torch.equal(injections.spoilt("experts", 1, values), values)
    injections.reached(3, "experts", 1, no_tokens)
    assert torch.equal(injections.spoilt("combine", 1, values), values)
    assert injections.spoilt("experts", 1, torch.ones(0, 3)).numel() == 0, "at the next chance"
    assert injections.spoilt("experts", 1, values).isnan().any()
    assert not values.isnan().any(), "a copy"
    assert torch.equal(injections.spoilt("experts", 1, values), values), "once"


def test_nan_without_a_place_comes_out_of_the_next_experts() -> None:
    injections = Injections()
    injections.add(Inject("x", "nan"))
    injections.reached(3, "schedule", -1, no_tokens)
    assert injections.spoilt("experts", 2, torch.ones(2, 3)).isnan().any()
