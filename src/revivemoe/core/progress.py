"""What the step loop is doing right now, how long such work usually takes, and when it last got on.

Written by the step loop, read by whoever sends the heartbeat (another thread). The clock is given.
"""

from collections.abc import Callable
from typing import NamedTuple

from revivemoe.messages.reports import Activity, Pace

LOAD_BUDGET_S = 600.0
"""What loading the model may take."""
ALPHA = 0.1
"""Weight of the newest call in a moving average."""


class _Now(NamedTuple):
    """Replaced as a whole: another thread reads it."""

    kind: str
    name: str
    layer: int
    step: int
    began: float
    budget_s: float | None
    size: int = 0


class Progress:
    """Counts every phase of every step, and times the rank's own work in it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic, seconds."""
        self._clock = clock
        self.count = 0
        self._paces: dict[str, dict[int, Pace]] = {}
        """By phase and size."""
        self._now = _Now("announced", "load", -1, 0, self._clock(), LOAD_BUDGET_S)
        self._phase_began = self._now.began
        self._waited_s = 0.0
        """In the present phase."""
        self._wait_began = 0.0
        self.total_waited_s = 0.0
        """Since the start."""

    # ---- written by the step loop ------------------------------------------------------------

    def work(self, name: str, layer: int, step: int, rows: int) -> None:
        """A phase of the step begins, and with it the one before has ended."""
        now = self._clock()
        self._close(now)
        size = rows.bit_length()
        self._begin(_Now("working", name, layer, step, now, self._predict(name, size), size))

    def idle(self) -> None:
        """Waiting for commands."""
        now = self._clock()
        self._close(now)
        self._begin(_Now("idle", "", -1, self._now.step, now, None))

    def announce(self, name: str, budget_s: float) -> None:
        """Something that is known to take long begins."""
        now = self._clock()
        self._close(now)
        self._begin(_Now("announced", name, -1, self._now.step, now, budget_s))

    def waits(self, waiting: bool) -> None:
        """The transport begins, or ends, to wait for peers."""
        now, was = self._clock(), self._now
        if waiting:
            self._wait_began = now
        else:
            self._waited_s += now - self._wait_began
            self.total_waited_s += now - self._wait_began
        kind = "waiting" if waiting else "working"
        self.count += 1
        self._now = _Now(kind, was.name, was.layer, was.step, now, was.budget_s, was.size)

    @property
    def phase(self) -> str:
        """Name of the present phase."""
        return self._now.name

    @property
    def own_s(self) -> float:
        """Own work in the present phase so far, waits not counted."""
        return self._clock() - self._phase_began - self._waited_s

    def _begin(self, what: _Now) -> None:
        self.count += 1
        self._waited_s = 0.0
        self._phase_began = what.began
        self._now = what

    def _close(self, now: float) -> None:
        """Enter the phase that ends into the averages."""
        ended = self._now
        if ended.kind not in ("working", "waiting"):
            return
        seconds = now - self._phase_began - self._waited_s
        known = self._paces.setdefault(ended.name, {})
        before = known.get(ended.size)
        if before is not None:
            seconds = before.seconds + ALPHA * (seconds - before.seconds)
        count = 1 if before is None else before.count + 1
        known[ended.size] = Pace(ended.name, ended.size, seconds, count)

    def _predict(self, name: str, size: int) -> float | None:
        """Seconds for so much work of a kind, from what it took so far; None without experience."""
        known = self._paces.get(name)
        if not known:
            return None
        if size in known:
            return known[size].seconds
        nearest = min(known.values(), key=lambda p: abs(p.size - size))
        return nearest.seconds * float(2 ** max(0, size - nearest.size))

    # ---- read by the control thread ----------------------------------------------------------

    def activity(self) -> Activity:
        """A snapshot."""
        now = self._now
        since_s = max(0.0, self._clock() - now.began)
        return Activity(now.kind, now.name, now.layer, now.step, since_s, now.budget_s)

    def paces(self) -> list[Pace]:
        """How long each kind of work takes."""
        return [pace for known in self._paces.copy().values() for pace in known.copy().values()]
