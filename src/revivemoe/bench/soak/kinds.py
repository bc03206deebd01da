"""Every kind of fault there is, and what must come of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from revivemoe.bench.soak.layouts import Layout
from revivemoe.messages.reports import PRODUCERS, STEP_PHASES

How = Literal[
    "kill",
    "stop",
    "blink",
    "relapse",
    "all",
    "engine",
    "fork_server",
    "inject",
    "apply",
    "pause",
    "switch",
]
"""Signals to ranks, to the engine, to the fork server; or asked of the API."""
Consequence = Literal["lost", "epoch", "noticed", "nothing"]
"""The ranks are out or have new processes; a new epoch; the status tells of the rank."""


@dataclass(frozen=True)
class Kind:
    name: str
    how: How
    consequence: Consequence = "lost"
    what: str = ""
    """The API's own name for it."""
    params: Mapping[str, object] = field(default_factory=dict)
    phases: Sequence[str] = ()
    """Of a step, one of which it strikes in; none: at once."""
    ranks: int = 1
    within_s: float = 0.0
    """How much later each further rank may be struck, at most; a pause may last, at most."""
    asked_back: bool = False
    """The ranks come back only if an operator asks."""
    mend: Literal["", "isolate", "clear"] = ""
    """What an operator does once it is noticed."""

    @property
    def aimed(self) -> bool:
        """Whether it is about some rank."""
        return self.how not in ("all", "engine", "pause") and self.what != "retry"


def kinds(layout: Layout) -> list[Kind]:
    """All that mean something in a layout. Left out: what must end requests (a poison request)."""
    both = 2 if not layout.experts else 1
    found = [
        Kind("kill", "kill"),
        Kind("stop", "stop"),
        Kind("blink", "blink", "nothing"),
        Kind("two at once", "kill", ranks=2),
        Kind("kill during recovery", "kill", ranks=2, within_s=0.1),
        Kind("kill during rejoin", "relapse"),
        Kind("all ranks", "all", ranks=len(layout.ranks)),
        Kind("engine stands still", "engine", "nothing"),
        Kind("fork server, then a rank", "fork_server"),
        Kind("pause", "pause", "epoch", within_s=2.0),
        Kind("retry", "apply", "epoch", "retry"),
        Kind("isolate", "apply", "lost", "isolate", asked_back=True),
        Kind("scale down", "apply", "lost", "scale_down", ranks=both, asked_back=True),
        *_in_a_step(),
        *(_device(level) for level in range(1, 7)),
    ]
    if layout.experts:
        found.append(Kind("role switch", "switch", "epoch", ranks=2))
    if layout.backend == "gloo":
        found.append(Kind("link", "inject", "epoch", "comm"))
    return found


def _in_a_step() -> list[Kind]:
    return [
        Kind("kill in a step", "inject", "lost", "kill", phases=STEP_PHASES),
        Kind("error", "inject", "lost", "error", phases=STEP_PHASES),
        Kind("memory", "inject", "lost", "memory", {"mebibytes": 256}, STEP_PHASES),
        Kind("loop", "inject", "lost", "hang", {"how": "loop"}, STEP_PHASES),
        Kind("deadlock", "inject", "lost", "hang", {"how": "deadlock"}, STEP_PHASES),
        Kind("stop in a step", "inject", "lost", "hang", {"how": "stop"}, STEP_PHASES),
        Kind("nan", "inject", "epoch", "nan", phases=PRODUCERS),
        Kind("slow", "inject", "noticed", "slow", {"factor": 8}, asked_back=True, mend="isolate"),
    ]


def _device(level: int) -> Kind:
    """By default L1 is logged, L2 watched, L3 redone, L4 drained, L5 and L6 isolated."""
    consequence: Consequence = ("nothing", "noticed", "epoch", "lost", "lost", "lost")[level - 1]
    return Kind(
        f"device L{level}",
        "inject",
        consequence,
        "device_fault",
        {"level": level, "code": "soak"},
        asked_back=level >= 4,
        mend="clear" if level == 2 else "",
    )
