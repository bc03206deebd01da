"""What is known to be wrong, as values."""

from dataclasses import dataclass
from typing import Literal

from revivemoe.ids import RankId

ISOLATE = 6
"""Level L6: the device must be taken out now. L1 needs no action (the paper's scale)."""

FaultKind = Literal[
    "process_exit",  # its process is gone
    "heartbeat",  # its process is silent: stopped, or its interpreter is stuck
    "hang",  # its process lives and its step loop does not get on
    "communication",  # the link between it and another rank failed twice in a row
    "non_finite",  # it turned finite numbers into NaN or infinity, twice
    "slow",  # its own work takes a multiple of its peers'
    "device_fault",  # a monitor of its device says so
    "fence_timeout",  # it did not answer a fence
    "start_timeout",  # its new process was not ready in time
    "isolate",  # an operator asked for it
    "role_switch",  # an operator wants it to become an expert rank
    "going_home",  # it is not needed any more in the place that it took
    "whatif",  # nobody did
]


@dataclass(frozen=True)
class Fault:
    """One rank accused by the detector, or by the coordinator for missing a deadline."""

    rank: RankId
    kind: FaultKind
    detail: str
    level: int = ISOLATE
    detect_s: float = 0.0
    """From the last evidence of life to the accusation, seconds: an upper bound."""
    signature: str = ""
    """Of a fault that a request may have brought about: kind and place. Empty for any other."""

    def __post_init__(self) -> None:
        assert 1 <= self.level <= ISOLATE, f"level {self.level}"
        assert self.detect_s >= 0, "accused before the last evidence of life"


@dataclass(frozen=True)
class DeviceReport:
    """What a monitor says of the device of one rank. Level 0: it is healthy again."""

    rank: RankId
    level: int
    code: str
    detail: str
    source: str
    """nvml | kubernetes | report | injected"""
    shared: tuple[RankId, ...] = ()
    """All ranks that this one signal speaks of, if there are several: those of a Node, or those
    that share a device. Each of them gets a report of its own."""
    times: int = 0
    """How often it has happened, where each time asks for something anew."""

    def __post_init__(self) -> None:
        assert 0 <= self.level <= ISOLATE, f"level {self.level}"
        assert not self.shared or self.rank in self.shared, f"{self} is not of its own ranks"
