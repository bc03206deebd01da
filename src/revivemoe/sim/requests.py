"""Coroutine protocol between a simulated rank's step loop and the process that drives it."""

from typing import NamedTuple


class DomainLeft(Exception):
    """The epoch has been fenced: leave at once."""


class CommunicationFailed(Exception):
    """The transport failed under this rank."""


class NumbersBroken(Exception):
    """The step met NaN here."""

    def __init__(self, phase: str, layer: int, produced_here: bool) -> None:
        super().__init__(f"NaN in {phase}, layer {layer}")
        self.phase, self.layer, self.produced_here = phase, layer, produced_here


class Work(NamedTuple):
    """Keep the step loop busy. Not interruptible, as own work is not."""

    phase: str
    layer: int
    seconds: float
    budget_s: float | None = None
    announced: bool = False


class Meet(NamedTuple):
    """Publish a value to all members and wait for theirs. Interruptible by the fence."""

    phase: str
    layer: int
    value: object


class Idle(NamedTuple):
    """Sleep until a command comes."""


Request = Work | Meet | Idle
