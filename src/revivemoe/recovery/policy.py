"""What recovery may do and how long it may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Bounds, not mechanism. All times in seconds."""

    max_missing_fraction: float = 1 / 32
    """Experts of one layer that may be masked (the paper finds accuracy to hold up to 1/32)."""
    max_recoveries: int = 8
    """More recoveries than this within the window: stop and say so, as a supervisor would."""
    window_s: float = 600.0
    fence_timeout_s: float = 10.0
    """For every survivor to roll back and acknowledge. A rank inside one long forward needs it."""
    resume_timeout_s: float = 20.0
    """For every member to agree on the first step of the new epoch."""
    symptom_grace_s: float = 1.0
    """How long an aborted step may wait for the detector to name a rank, before the same members
    are given a new domain."""
