"""What the step loop asks of whoever drives it, and what may interrupt it. No torch, clock, I/O.

The driver answers each effect with `send`, or throws one of the interruptions into the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from revivemoe.core.step import Batch, StepHeader, StepResult
from revivemoe.ids import Epoch
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table
from revivemoe.messages.commands import Configure, DomainSpec, LoadExperts


class Left(Exception):
    """The epoch has been fenced: roll back, await the next one. Not an error."""


class Broken(Exception):
    """The step failed under this rank: a symptom."""


class LoadFailed(Exception):
    """What the map gives to this rank could not be loaded."""


# ---- answers ------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the first NaN or infinity of a step appeared on this rank."""

    layer: int
    """-1: behind the last one."""
    phase: str
    produced_here: bool
    """What came in was finite."""


class Ran(NamedTuple):
    """A forward's results, in the order of the batch's items."""

    results: Sequence[StepResult]
    seconds: float
    waited_s: float = 0.0
    """Of these, for peers."""


class Loaded(NamedTuple):
    """Experts that were loaded."""

    seconds: float
    num_bytes: int
    sources: dict[str, int]
    """How many, by where they came from: peer | host | disk."""


class Departure(NamedTuple):
    """How a domain was left."""

    place: Place | None
    seconds: float


# ---- effects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commands:
    """-> list[Command]: those that have come, in order. `wait`: sleep until there is one, or a
    while."""

    wait: bool


@dataclass(frozen=True)
class Reach:
    """A phase of the step begins here -> None. Progress, and where injected faults strike."""

    phase: str
    num_rows: int = 0


@dataclass(frozen=True)
class Exchange:
    """-> list[StepHeader]: every member's, in logical order. May raise Left, Broken."""

    header: StepHeader


@dataclass(frozen=True)
class Forward:
    """-> Ran. An empty batch: serve experts only. May raise Left, Broken."""

    batch: Batch


@dataclass(frozen=True)
class Load:
    """-> Loaded, once the slots hold `table`, and this rank `shards` of the dense layers.
    May raise Left, LoadFailed."""

    membership: Membership
    """Whose members may be asked for what they hold; a fence above its epoch ends the load."""
    table: Table
    domain: DomainSpec
    shards: frozenset[int] = frozenset()

    @property
    def epoch(self) -> Epoch:
        return self.membership.epoch


@dataclass(frozen=True)
class LoadBeside:
    """Load into free slots while the steps go on -> None; the driver reports the end of it."""

    command: LoadExperts


@dataclass(frozen=True)
class GiveUpAttention:
    """Drop the attention side's weights and pages; so many empty slots in every layer -> None.
    May raise LoadFailed: without memory for them there are no slots."""

    num_slots: int


@dataclass(frozen=True)
class Enter:
    """-> float: seconds it took to enter the domain of this epoch. May raise Left, Broken."""

    configure: Configure


@dataclass(frozen=True)
class Leave:
    """-> Departure. Leave the domain, waiting for nobody; zero what `begun` has written."""

    begun: Batch | None


Effect = Commands | Reach | Exchange | Forward | Load | LoadBeside | GiveUpAttention | Enter | Leave
