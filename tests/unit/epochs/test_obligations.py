"""The table of what is owed."""

import pytest

from revivemoe.epochs.obligations import AGAIN_S, Obligation, Obligations


def owe(table: Obligations, who: int, due: float, lapsed: list[int]) -> None:
    table.owe(Obligation("load", who, 0.0, due, "nothing", lambda now: lapsed.append(who)))


def test_the_oldest_lapses_first_and_once() -> None:
    table, lapsed = Obligations(), list[int]()
    for who, due in ((1, 3.0), (2, 1.0), (3, 9.0)):
        owe(table, who, due, lapsed)
    while table.see_to_one(5.0):
        pass
    assert lapsed == [2, 1]
    assert [o.who for o in table] == [3]


def test_what_is_met_does_not_lapse_and_what_is_owed_again_has_its_new_deadline() -> None:
    table, lapsed = Obligations(), list[int]()
    owe(table, 1, 1.0, lapsed)
    owe(table, 2, 1.0, lapsed)
    owe(table, 2, 8.0, lapsed)
    assert table.met("load", 1)
    assert not table.met("load", 1)
    assert not table.see_to_one(5.0)
    table.postpone(2.0)
    assert not table.see_to_one(9.9)
    assert table.see_to_one(10.0)


def test_one_that_raises_is_due_again_and_keeps_no_other_from_its_end() -> None:
    table, lapsed = Obligations(), list[int]()

    def fail(now: float) -> None:
        raise RuntimeError

    table.owe(Obligation("start", 1, 0.0, 1.0, "nothing", fail))
    owe(table, 2, 2.0, lapsed)
    with pytest.raises(RuntimeError):
        table.see_to_one(5.0)
    assert table.see_to_one(5.0)
    assert lapsed == [2]
    assert not table.see_to_one(5.0 + AGAIN_S - 0.1)
    with pytest.raises(RuntimeError):
        table.see_to_one(5.0 + AGAIN_S)


def test_nothing_is_owed_for_ever() -> None:
    with pytest.raises(AssertionError):
        Obligation("load", 1, 0.0, float("inf"), "nothing", lambda now: None)
