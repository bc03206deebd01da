"""The states of an instance: a tagged union, each with only its own fields."""

from dataclasses import dataclass
from typing import assert_never


@dataclass(frozen=True)
class Starting:
    """Ranks load; then they meet for the first time (`start`)."""


@dataclass(frozen=True)
class Serving:
    pass


@dataclass(frozen=True)
class Recovering:
    pass


@dataclass(frozen=True)
class Paused:
    """An operator stopped all ranks at a step boundary; the streams wait."""


@dataclass(frozen=True)
class FailedState:
    """The end: an orchestrator restarts the instance."""

    reason: str
    user_error: bool = False


State = Starting | Serving | Recovering | Paused | FailedState


def state_name(state: State) -> str:
    """As the status document spells it."""
    match state:
        case Starting():
            return "starting"
        case Serving():
            return "serving"
        case Recovering():
            return "recovering"
        case Paused():
            return "paused"
        case FailedState():
            return "failed"
        case _:
            assert_never(state)
