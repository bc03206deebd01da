from dataclasses import replace

from revivemoe.health.source import Changes
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport


def report(rank: int, code: str, level: int, detail: str = "seen") -> DeviceReport:
    return DeviceReport(RankId(rank), level, code, detail, "test")


def test_the_worst_of_each_code_counts() -> None:
    both = [report(0, "a", 5), report(0, "a", 5, "again")]
    found = Changes().to([report(0, "a", 2), *both, report(0, "b", 0), report(1, "a", 3)])
    assert found == [report(0, "a", 5), report(1, "a", 3)]


def test_only_changes_of_level_are_changes() -> None:
    changes = Changes()
    assert changes.to([]) == []
    changes.to([report(0, "same", 3), report(0, "rises", 2), report(1, "gone", 4)])
    now = [report(0, "same", 3, "again"), report(0, "rises", 5), report(2, "new", 1)]
    assert changes.to(now) == [
        report(1, "gone", 0, "gone is over"),
        report(0, "rises", 5),
        report(2, "new", 1),
    ]
    assert changes.to(now) == []


def test_whom_a_report_speaks_of_is_told_anew_when_that_changes() -> None:
    """Which ranks share a device may be found out while something is wrong with it."""
    changes = Changes()
    first = report(0, "a", 4)
    assert changes.to([first]) == [first]
    both = [replace(report(rank, "a", 4), shared=(RankId(0), RankId(1))) for rank in (0, 1)]
    assert changes.to(both) == both
    assert changes.to(both) == []
    over = replace(report(1, "a", 0, "a is over"), shared=(RankId(1),))
    assert changes.to([first]) == [over, first], "and of rank 0 it is not over"
