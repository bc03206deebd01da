"""What one recovery did and how long each stage took, as the status document reports it."""

from dataclasses import dataclass, field
from typing import Literal

from revivemoe.ids import Epoch, RankId
from revivemoe.recovery.faults import Fault

PHASES = ("fence", "rollback", "plan", "migrate", "experts", "domain", "graphs", "resume")
"""Stages in order, as in the contract."""

Outcome = Literal["recovered", "restarted", "failed"]


@dataclass
class RecoveryRecord:
    """Filled in stage by stage by the coordinator; closed with an outcome. Times in seconds."""

    epoch: Epoch
    cause: str
    """Kind of the first fault, or what else the change of epoch is for."""
    faults: list[Fault]
    started: float
    """Monotonic."""
    reason: str = ""
    outcome: Outcome | None = None
    finished: float | None = None
    last_old_step: float | None = None
    """When the engine took in the last step committed in the old epoch; None if nobody had work."""
    first_new_step: float | None = None
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    migrated: int = 0
    recomputed_tokens: int = 0
    experts_dropped: int = 0
    experts_reloaded: int = 0
    experts_masked: int = 0
    role_switched: RankId | None = None
    recompiled: int = 0
    reconciled: int = 0
    """Survivors' sequences whose holdings differed from the log and were mended."""
    restarted: tuple[RankId, ...] = ()
    """Ranks that were started anew for it."""
    request_id: str | None = None
    """Of the operator's request that it carries out."""
    rolled_back: int = 0
    """Ranks whose open step was undone."""

    @property
    def detect_s(self) -> float:
        return max((f.detect_s for f in self.faults), default=0.0)

    @property
    def stall_s(self) -> float | None:
        """Last step of the old epoch to the first of the new; None when nobody had work."""
        if self.last_old_step is None or self.first_new_step is None:
            return None
        return self.first_new_step - self.last_old_step
