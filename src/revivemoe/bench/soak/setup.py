"""What is asked of a soak."""

from dataclasses import dataclass
from pathlib import Path

Range = tuple[float, float]


@dataclass(frozen=True)
class Setup:
    model: Path | None = None
    """None: one is made."""
    preset: str = "tiny"
    layout: str = "both"
    minutes: float = 30.0
    """In all, not counting starts and warm-up."""
    every_s: Range = (10.0, 20.0)
    """From the moment all is well until the next fault."""
    seed: int = 0
    backend: str = "auto"
    streams: int = 8
