"""Where a rank stands between epochs and steps: a tagged union, each with only its own fields."""

from dataclasses import dataclass

from revivemoe.core.step import Batch
from revivemoe.ids import Epoch


@dataclass(frozen=True, slots=True)
class Unconfigured:
    """No epoch has been entered yet."""


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A step that is scheduled and not yet committed."""

    batch: Batch
    executing: bool = False
    """Whether the forward may have written KV."""


@dataclass(frozen=True, slots=True)
class InDomain:
    """Takes part in the steps of an epoch."""

    epoch: Epoch
    step: int
    """The next step, or the open one."""
    mask_key: bytes
    """Which experts are masked in this epoch; b"" when none are."""
    open: OpenStep | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    """A member, but out of the step loop: nobody had work when the last agreement was made."""

    epoch: Epoch
    step: int
    mask_key: bytes
    wake: int
    """The counter all members agreed on; a higher one unparks."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """Left every epoch below `epoch`; may enter that one or a later one."""

    epoch: Epoch
    next_step: int


RankState = Unconfigured | InDomain | Parked | Fenced
