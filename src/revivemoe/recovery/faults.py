"""What is known to be wrong, as values."""

from dataclasses import dataclass

from revivemoe.ids import RankId

ISOLATE = 6
"""Level L6: the device must be taken out now. L1 needs no action (the paper's scale)."""


@dataclass(frozen=True)
class Fault:
    """One rank accused by the detector, or by the coordinator for missing a deadline."""

    rank: RankId
    kind: str
    """process_exit | fence_timeout"""
    detail: str
    level: int = ISOLATE
    detect_s: float = 0.0
    """From the last evidence of life to the accusation, seconds: an upper bound."""
