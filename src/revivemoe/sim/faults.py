"""What is done to the simulated instance, and when. Values only."""

from dataclasses import dataclass
from typing import Literal

FaultKind = Literal[
    "kill",  # the process exits
    "error",  # its own code fails: last words, then it exits
    "stop",  # SIGSTOP: silent; killing it works
    "corpse",  # silent and unkillable: stuck in a driver, no exit ever comes
    "zombie",  # silent and unkillable for a while, then it goes on as if nothing had been
    "hang",  # the step loop is stuck, heartbeats go on
    "slow",  # own work takes five times as long
    "link",  # the link between two members fails once
    "link-twice",  # ... and once more in the next epoch
    "nan",  # a rank turns finite numbers into NaN, once
    "nan-twice",  # ... and when the step is done again
    "kill-two",  # two processes at once
    "kill-all",  # all processes at once
    "stall",  # the engine itself stands still
    "forkserver",  # the fork server ends: nothing can be launched
    "health",  # a monitor reports the device of a rank
    "poison",  # a request kills whoever runs it (armed by its admission)
]


@dataclass(frozen=True)
class AtTime:
    """So many seconds after the instance serves for the first time."""

    seconds: float


@dataclass(frozen=True)
class AtPoint:
    """When the rank gets to this place in this step, or in a later one."""

    step: int
    layer: int
    phase: str


@dataclass(frozen=True)
class InStage:
    """Shortly after the engine has entered this stage of a recovery."""

    stage: str
    delay_s: float


When = AtTime | AtPoint | InStage


@dataclass(frozen=True)
class FaultSpec:
    """One fault of a scenario."""

    kind: FaultKind
    rank: int
    when: When
    peer: int = 0
    """The other end of a link, the second rank killed."""
    level: int = 6
    """Of a device report."""
    seconds: float = 3.0
    """Of a stall, or until a zombie goes on."""
