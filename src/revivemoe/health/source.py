"""What a source of health signals is, and how states become changes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport


class HealthSource(Protocol):
    """Looks at devices when asked. Belongs to one thread: polled and closed by the same one."""

    @property
    def name(self) -> str:
        """For log lines and thread names."""

    def poll(self) -> list[DeviceReport]:
        """What has changed since the last call, per (rank, code); level 0: healthy again.

        Takes bounded time. May raise: the next call then starts from the same state, and reports
        what this one could not.
        """

    def close(self) -> None:
        """Give up what it holds. May be called without a poll before it, and only once."""


class Changes:
    """From states to changes: remembers the last report per (rank, code), healthy ones left out."""

    def __init__(self) -> None:
        self._last: dict[tuple[RankId, str], DeviceReport] = {}

    def to(self, reports: Iterable[DeviceReport]) -> list[DeviceReport]:
        """Reports that appeared, changed their level or whom they speak of, or happened once more,
        then a level 0 for each that is gone, which speaks of none that still has it.

        Of several for one (rank, code) the highest level counts, and of equals the first.
        """
        before, now = self._last, dict[tuple[RankId, str], DeviceReport]()
        for report in reports:
            key = (report.rank, report.code)
            if report.level > (now[key].level if key in now else 0):
                now[key] = report
        self._last = now
        risen = [r for k, r in now.items() if k not in before or _news(before[k], r)]
        cleared = [
            replace(
                report,
                level=0,
                detail=f"{report.code} is over",
                shared=tuple(rank for rank in report.shared if (rank, report.code) not in now),
            )
            for key, report in before.items()
            if key not in now
        ]
        return cleared + risen  # of one signal the last word counts


def _news(before: DeviceReport, now: DeviceReport) -> bool:
    return replace(before, detail=now.detail) != now
