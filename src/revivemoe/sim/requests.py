"""Coroutine protocol between a simulated rank's driver and the process that runs it."""

from typing import NamedTuple


class Work(NamedTuple):
    """Keep the step loop busy. Not interruptible, as own work is not."""

    phase: str
    layer: int
    seconds: float


class Meet(NamedTuple):
    """Publish a value to all members and wait for theirs. Interruptible by the fence."""

    phase: str
    layer: int
    value: object


class Idle(NamedTuple):
    """Sleep until a command comes, or for a while."""


Request = Work | Meet | Idle
