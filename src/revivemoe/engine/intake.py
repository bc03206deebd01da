"""The one way in for what happens: reports, exits, monitors, time. No exception gets past it.

What is wrong with one report ends that one; deadlines see to what it should have brought about.
"""

import logging
from collections.abc import Callable
from functools import partial

from revivemoe.engine.engine import Engine
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.complaints import Complaints
from revivemoe.messages.events import InternalError
from revivemoe.messages.reports import Report
from revivemoe.recovery.faults import DeviceReport

log = logging.getLogger("revivemoe.engine")

TICKS_IN_VAIN = 40
"""After so many ticks in a row that came to nothing no deadline can be relied upon any more."""


class Intake:
    """Hands everything to the engine, and keeps what goes wrong with it from spreading."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._complaints: dict[str, Complaints] = {}
        """By what was taken in."""
        self._ticks_in_vain = 0

    def report(self, report: Report, now: float) -> None:
        """A rank has said something."""
        what = type(report).__name__
        self._contain(what, now, lambda: self._engine.on_report(report, now))

    def arrived(self, rank: RankId, incarnation: Incarnation, pid: int, now: float) -> None:
        """A process has come into being."""
        self._contain("arrival", now, lambda: self._engine.on_arrived(rank, incarnation, pid, now))

    def exited(
        self, rank: RankId, incarnation: Incarnation, detail: str, by_itself: bool, now: float
    ) -> None:
        """A process is gone."""
        told = (rank, incarnation, detail, now)
        self._contain("exit", now, lambda: self._engine.on_exit(*told, by_itself=by_itself))

    def forkserver_gone(self, now: float) -> None:
        self._contain("fork server", now, self._engine.signals.on_forkserver_gone)

    def health(self, report: DeviceReport, now: float) -> None:
        """A monitor has said something."""
        self._contain("device report", now, lambda: self._engine.on_health(report, now))

    def tick(self, now: float) -> None:
        """Time has passed."""
        went_well = self._contain("tick", now, lambda: self._engine.tick(now))
        self._ticks_in_vain = 0 if went_well else self._ticks_in_vain + 1
        if self._ticks_in_vain >= TICKS_IN_VAIN:
            self._engine.fail(f"internal error in {TICKS_IN_VAIN} ticks in a row: see the log")

    def _contain(self, what: str, now: float, take: Callable[[], object]) -> bool:
        """Returns whether it went well."""
        try:
            take()
        except Exception as error:  # the boundary of the engine: whatever it is, it ends here
            self._engine.traffic.totals.internal_errors[what] += 1
            if what not in self._complaints:
                tell = partial(self._complain, what)
                self._complaints[what] = Complaints(f"{what}: exceptions of the engine", tell)
            self._complaints[what].add(error, now)
            return False
        return True

    def _complain(self, what: str, line: str, error: Exception) -> None:
        log.error("%s", line, exc_info=error)
        self._engine.tell(InternalError(what, line))
