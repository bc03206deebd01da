from revivemoe.health.source import changes, worst
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport


def report(rank: int, code: str, level: int, detail: str = "seen") -> DeviceReport:
    return DeviceReport(RankId(rank), level, code, detail, "test")


def test_the_worst_of_each_code_counts() -> None:
    found = worst([report(0, "a", 2), report(0, "a", 5), report(0, "b", 0), report(1, "a", 3)])
    assert found == {
        (RankId(0), "a"): report(0, "a", 5),
        (RankId(1), "a"): report(1, "a", 3),
    }


def test_only_changes_of_level_are_changes() -> None:
    before = worst([report(0, "same", 3), report(0, "rises", 2), report(1, "gone", 4)])
    now = worst([report(0, "same", 3, "again"), report(0, "rises", 5), report(2, "new", 1)])
    assert changes(before, now) == [
        report(0, "rises", 5),
        report(2, "new", 1),
        report(1, "gone", 0, "gone is over"),
    ]
    assert changes(now, now) == []
    assert changes({}, {}) == []
