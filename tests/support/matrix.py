"""The matrix of faults: what strikes, where in a step, under which load, over which transport."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    victims: tuple[int, ...] = (1, 2, 3)
    """One of them is struck."""

    @property
    def name(self) -> str:
        detail = [str(v) for v in self.params.values()]
        where = "idle" if self.idle else self.phase or "any"
        who = [f"rank{self.victims[0]}"] if len(self.victims) == 1 else []
        return "-".join([self.kind, *detail, where, *who])


@dataclass(frozen=True)
class Layout:
    """A deployment that takes one fault after another."""

    backend: str
    attention: int
    experts: int = 0

    @property
    def name(self) -> str:
        if not self.experts:
            return self.backend
        return f"{self.backend}-{self.attention}+{self.experts}"

    @property
    def ranks(self) -> range:
        return range(self.attention + self.experts)


COLLOCATED = (Layout("shm", 4), Layout("gloo", 4))
DISAGGREGATED = (
    Layout("shm", 3, 2), Layout("shm", 2, 3), Layout("shm", 2, 2), Layout("gloo", 3, 2),
)  # fmt: skip
LAYOUTS = (*COLLOCATED, *DISAGGREGATED)


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


def disaggregated_cells(layout: Layout) -> list[Cell]:
    """A kill of each rank at each phase; at 3+2 every other kind as well, where it means something
    (numbers are made by attention ranks at attention and sample, by expert ranks at experts).
    """
    found = [
        Cell("kill", phase, cause="process_exit", victims=(rank,))
        for rank in layout.ranks
        for phase in PHASES
    ]
    if (layout.attention, layout.experts) == (3, 2):
        others = [
            cell for cell in cells(layout.backend) if not (cell.kind == "kill" and not cell.idle)
        ]
        makers = {"attention": (1, 2), "sample": (1, 2), "combine": (1, 2), "experts": (3, 4)}
        found += [
            replace(cell, victims=makers[cell.phase or ""])
            if cell.kind in ("nan", "slow")
            else replace(cell, victims=(1, 2, 3, 4))
            for cell in others
        ]
    return found


def cells_of(layout: Layout) -> list[Cell]:
    return disaggregated_cells(layout) if layout.experts else cells(layout.backend)


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


def part(layout: Layout) -> list[Cell]:
    """What runs with every change: each kind, each phase, each level, idle and loaded, once."""
    chosen = {
        "shm-3+2": (
            "kill-attention-rank0", "kill-dispatch-rank1", "kill-experts-rank4",
            "kill-combine-rank3", "kill-commit-rank0", "hang-sample", "nan-experts",
            "device_fault-4-any",
        ),
        "shm": (
            "kill-schedule", "kill-sample", "error-dispatch", "hang-experts", "hang-stop-experts",
            "nan-sample", "slow-8-experts", "hang-loop-idle", "device_fault-2-any",
            "device_fault-3-any", "device_fault-6-any", "device_fault-4-idle",
        ),
        "gloo": (
            "kill-attention", "hang-combine", "nan-attention", "comm-0-dispatch", "comm-0-idle",
            "kill-idle", "device_fault-5-any",
        ),
    }.get(layout.name, ())  # fmt: skip
    by_name = {cell.name: cell for cell in cells_of(layout)}
    return [by_name[name] for name in chosen]
