"""The matrix of faults: what strikes, where in a step, under which load, over which transport."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PHASES = ("schedule", "attention", "dispatch", "experts", "combine", "sample", "commit")
SPOILABLE = ("attention", "experts", "combine", "sample")


@dataclass(frozen=True)
class Cell:
    """One fault, and what it must come to."""

    kind: str
    phase: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    idle: bool = False
    """Strikes while nobody has work; else in the middle of a load."""
    cause: str | None = None
    """Of the recovery; None: nothing is to be recovered from."""
    lost: bool = True
    """Whether a rank goes."""

    @property
    def name(self) -> str:
        detail = [str(v) for v in self.params.values()]
        where = "idle" if self.idle else self.phase or "any"
        return "-".join([self.kind, *detail, where])


def cells(backend: str) -> list[Cell]:
    """All that mean something on this transport. Left out, and why:

    - comm over shm: shared memory has no link to cut (the API refuses it);
    - nan in schedule, dispatch, commit: nothing is computed there;
    - nan and slow while idle: nothing is computed then;
    - device faults at a phase: monitors know nothing of phases; they come at a step;
    - hang by deadlock and by SIGSTOP in each phase: where it stands is the same as for the loop.
    """
    found = [Cell("kill", p, cause="process_exit") for p in PHASES]
    found += [Cell("error", p, cause="process_exit") for p in PHASES]
    found += [Cell("hang", p, cause="hang") for p in PHASES]
    found += [
        Cell("hang", "experts", {"how": "stop"}, cause="heartbeat"),
        Cell("hang", "attention", {"how": "deadlock"}, cause="hang"),
    ]
    found += [Cell("nan", p, cause="non_finite", lost=False) for p in SPOILABLE]
    found += [Cell("slow", "experts", {"factor": 8}, lost=False)]
    if backend == "gloo":
        found += [Cell("comm", p, {"peer": 0}, cause="communication", lost=False) for p in PHASES]
        found += [Cell("comm", None, {"peer": 0}, True, "communication", lost=False)]
    return [*found, *_idle(), *_device_faults()]


def _idle() -> Iterator[Cell]:
    yield Cell("kill", idle=True, cause="process_exit")
    yield Cell("error", idle=True, cause="process_exit")
    for how, cause in (("loop", "hang"), ("deadlock", "hang"), ("stop", "heartbeat")):
        yield Cell("hang", None, {"how": how}, True, cause)


def _device_faults() -> Iterator[Cell]:
    for idle in (False, True):
        for level in range(1, 7):
            lost, moved = level >= 4, level >= 3
            cause = "device_fault" if moved else None
            yield Cell("device_fault", None, {"level": level}, idle, cause, lost)


def part(backend: str) -> list[Cell]:
    """What runs with every change: each kind, each phase, each level, idle and loaded, once."""
    chosen = {
        "shm": (
            "kill-schedule", "kill-combine", "error-dispatch", "hang-experts", "hang-sample",
            "hang-stop-experts", "nan-experts", "nan-sample", "slow-8-experts", "hang-loop-idle",
            "hang-stop-idle", "device_fault-2-any", "device_fault-3-any", "device_fault-4-any",
            "device_fault-6-any", "device_fault-4-idle",
        ),
        "gloo": (
            "kill-attention", "hang-combine", "hang-stop-experts", "nan-attention",
            "comm-0-dispatch", "comm-0-idle", "kill-idle", "device_fault-5-any",
        ),
    }[backend]  # fmt: skip
    by_name = {cell.name: cell for cell in cells(backend)}
    return [by_name[name] for name in chosen]
