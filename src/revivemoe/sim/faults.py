"""What is done to the simulated instance, and when. Values only."""

from dataclasses import dataclass
from typing import Literal, get_args

FaultKind = Literal[
    "kill",  # the process exits
    "kill-two",  # two processes at once
    "kill-all",  # all processes at once
    "kill-down",  # one after another, down to the last
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
    "health",  # a monitor reports the device of a rank
    "health-two",  # ... of two ranks that share one
    "health-node",  # ... the whole node, and takes it back later
    "poison",  # a request brings down whoever runs it, by an error
    "poison-hang",  # ... by a hang
    "load-fails",  # the next load of experts or weights fails
    "launch-slow",  # the next process takes long to load; then a kill
    "load-silent",  # the next load beside the steps is never answered
    "load-endless",  # the next process never comes to the end of its load; then a kill
    "launch-late",  # ... comes into being after it was given up; then a kill
    "lost-tokens",  # what a rank reports of its next step never comes
    "exit-late",  # a kill whose exit is told of late
    "exit-never",  # ... never
    "deaf",  # the process does not stop when it is told to
    "late-ticks",  # the engine's ticks come when they like
    "stall",  # the engine itself stands still
    "forkserver",  # the fork server ends: launches under way, and some later ones, are lost
    "drain",  # an operator takes a rank out
    "switch",  # an expert rank exits, and an operator wants another rank to take its place
    "kill-switching",  # the process that is loading for its new role exits
    "rejoin",  # an operator lets a rank that is out come back
    "restore",  # an operator has missing experts loaded
    "retry",  # an operator asks for a new domain
    "retries",  # ... again and again
    "pause",  # an operator stops all ranks, and lets them go on later
]

KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
POISONS: tuple[FaultKind, ...] = ("poison", "poison-hang")


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
    kind: FaultKind
    rank: int
    when: When
    peer: int = 0
    """The other end of a link, the second rank killed."""
    level: int = 6
    """Of a device report."""
    seconds: float = 3.0
    """Of a stall or a pause, or until a zombie goes on or a node is well again."""

    def is_at(self, rank: int, step: int, phase: str, layer: int) -> bool:
        """Whether it waits for this place. Later steps match too: a step that the rank did not take
        part in disarms nothing.
        """
        when = self.when
        return (
            isinstance(when, AtPoint)
            and self.rank == rank
            and step >= when.step
            and phase == when.phase
            and layer in (when.layer, -1)
        )
