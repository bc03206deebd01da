"""Where a change of epoch stands: a tagged union, each stage with only its own fields."""

from dataclasses import dataclass, field

from revivemoe.epochs.record import RecoveryRecord
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.reports import FenceAck
from revivemoe.recovery.plan import Continue


@dataclass(frozen=True)
class Idle:
    """No change under way."""


@dataclass
class Fencing:
    """Waiting for every member that is not accused to have rolled back."""

    epoch: Epoch
    deadline: float
    record: RecoveryRecord
    waiting: set[RankId]
    acks: dict[RankId, FenceAck] = field(default_factory=dict)
    at_boundary: bool = False
    """All stop together before a step; nothing is rolled back."""
    hold: bool = False
    """Stay fenced until told to go on (pause)."""


@dataclass
class Restarting:
    """Waiting for ranks that are started anew; the survivors stay fenced."""

    epoch: Epoch
    deadline: float
    record: RecoveryRecord
    fenced: set[RankId]
    """Ranks that have acknowledged the fence."""


@dataclass
class Resuming:
    """Waiting for every member to have agreed on the first step of the new epoch."""

    plan: Continue
    deadline: float
    configured: float
    record: RecoveryRecord
    waiting: set[RankId]
    domain_s: float = 0.0
    experts_s: float = 0.0


@dataclass(frozen=True)
class Recovered:
    """The new epoch runs."""

    plan: Continue
    record: RecoveryRecord


@dataclass(frozen=True)
class Failed:
    """Recovery does not cover what happened."""

    reason: str
    record: RecoveryRecord


Stage = Idle | Fencing | Restarting | Resuming
Finished = Recovered | Failed
