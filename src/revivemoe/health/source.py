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
        ...

    def poll(self) -> list[DeviceReport]:
        """What has changed since the last call, per (rank, code); level 0: healthy again.

        Takes bounded time. May raise: the next call then starts from the same state, and reports
        what this one could not.
        """
        ...

    def close(self) -> None:
        """Give up what it holds. May be called without a poll before it, and only once."""
        ...


Reported = dict[tuple[RankId, str], DeviceReport]
"""The last report per (rank, code), healthy ones left out."""


def worst(reports: Iterable[DeviceReport]) -> Reported:
    """One report per (rank, code): that of the highest level, the first one of equals."""
    found: Reported = {}
    for report in reports:
        key = (report.rank, report.code)
        if report.level > 0 and (key not in found or report.level > found[key].level):
            found[key] = report
    return found


def changes(before: Reported, now: Reported) -> list[DeviceReport]:
    """Reports that appeared or changed their level, then a level 0 for each that is gone."""
    risen = [
        report
        for key, report in now.items()
        if key not in before or before[key].level != report.level
    ]
    cleared = [
        replace(report, level=0, detail=f"{report.code} is over")
        for key, report in before.items()
        if key not in now
    ]
    return risen + cleared
