"""Who is accused. Pure: facts come in with their times, accusations come out.

First slice: a process that exited is gone, nothing else is an accusation. A missed heartbeat makes
a rank `suspect` in the status; a communication error accuses nobody.
"""

from dataclasses import dataclass, replace

from revivemoe.ids import Incarnation, RankId
from revivemoe.recovery.faults import Fault


@dataclass(frozen=True)
class Vitals:
    """The last evidence of life of one rank's present process."""

    incarnation: Incarnation
    last_seen: float
    exited: bool = False


class Detector:
    """Keeps the vitals of every rank. Times are seconds of one monotonic clock, passed in."""

    def __init__(self, suspect_after_s: float = 1.0) -> None:
        self._suspect_after_s = suspect_after_s
        self._vitals: dict[RankId, Vitals] = {}

    def launched(self, rank: RankId, incarnation: Incarnation, now: float) -> None:
        """A process was started for this rank."""
        self._vitals[rank] = Vitals(incarnation, now)

    def heard(self, rank: RankId, incarnation: Incarnation, now: float) -> None:
        """Any message of the rank's present process is evidence of life."""
        vitals = self._vitals.get(rank)
        if vitals is not None and vitals.incarnation == incarnation and not vitals.exited:
            self._vitals[rank] = replace(vitals, last_seen=now)

    def exited(
        self, rank: RankId, incarnation: Incarnation, detail: str, now: float
    ) -> Fault | None:
        """The process exited. None if it was not the rank's present one, or is known already."""
        vitals = self._vitals.get(rank)
        if vitals is None or vitals.incarnation != incarnation or vitals.exited:
            return None
        self._vitals[rank] = replace(vitals, exited=True)
        return Fault(rank, "process_exit", detail, detect_s=max(0.0, now - vitals.last_seen))

    def age_s(self, rank: RankId, now: float) -> float | None:
        """Seconds since the last evidence of life; None if the rank never had a process."""
        vitals = self._vitals.get(rank)
        return None if vitals is None else max(0.0, now - vitals.last_seen)

    def suspect(self, rank: RankId, now: float) -> bool:
        """Silent for longer than is normal. Not an accusation."""
        age_s = self.age_s(rank, now)
        return age_s is not None and age_s > self._suspect_after_s
