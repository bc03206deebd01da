"""Micro-batches take turns: one at a time, in one order, and all end together."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revivemoe.model.turns import Turns

LIMIT_S = 10.0
"""For a run that takes milliseconds."""


def bounded(turns: Turns, tasks: list[Callable[[], Any]]) -> list[Any]:
    """`turns.run(tasks)`, or what it raises, or a failure of the test if it does not end."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append((True, turns.run(tasks)))
        except BaseException as error:
            ended.append((False, error))

    thread = threading.Thread(target=run, name="caller", daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if not ended:
        _let_go(turns)
        pytest.fail(f"the micro-batches did not end within {LIMIT_S:.0f} s")
    done, value = ended[0]
    if not done:
        raise value
    return list(value)


def _let_go(turns: Turns) -> None:
    """Threads that hang would keep the process from ending."""
    turns._failure = TimeoutError()
    for door in turns._doors * 50:
        door.release()


class Log:
    """Tasks that write down what they do. Two at once are seen."""

    def __init__(self) -> None:
        self.turns = Turns(self._on_turn)
        self.order: list[int] = []
        """The task of every piece of work, in the order they began."""
        self.announced: list[tuple[int, int]] = []
        """(task, thread) of each `on_turn`."""
        self.threads: dict[int, set[int]] = {}
        self.running: set[int] = set()
        """Tasks that have begun and not ended."""
        self.clashes = 0
        self._busy = 0

    def _on_turn(self, number: int) -> None:
        self.announced.append((number, threading.get_ident()))

    def work(self, number: int) -> None:
        """Something that takes a moment, with chances for another thread to come in."""
        self._busy += 1
        self.order.append(number)
        self.threads.setdefault(number, set()).add(threading.get_ident())
        for _ in range(3):
            time.sleep(0)
            self.clashes += self._busy != 1
        self._busy -= 1

    def task(
        self, number: int, num_turns: int, fail: BaseException | None = None,
        at_end: BaseException | None = None,
    ) -> Callable[[], str]:  # fmt: skip
        """Works, and gives up its turn `num_turns` times in between. `fail` is raised behind the
        last piece of work; `at_end` whenever and however it ends.
        """

        def run() -> str:
            self.running.add(number)
            try:
                self.work(number)
                for _ in range(num_turns):
                    self.turns.give_up_turn()
                    self.work(number)
                if fail is not None:
                    raise fail
                return f"result {number}"
            finally:
                self.running.discard(number)
                if at_end is not None:
                    raise at_end

        return run


def rounds(nums_turns: list[int]) -> list[int]:
    """Round and round, without those that are through."""
    return [
        number
        for turn in range(max(nums_turns) + 1)
        for number, num_turns in enumerate(nums_turns)
        if turn <= num_turns
    ]


# ---- order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nums_turns", "order"),
    [
        ([3], [0, 0, 0, 0]),
        ([2, 2], [0, 1, 0, 1, 0, 1]),
        ([0, 2], [0, 1, 1, 1]),
        ([2, 0], [0, 1, 0, 0]),
        ([1, 1, 1], [0, 1, 2, 0, 1, 2]),
        ([2, 0, 1], [0, 1, 2, 0, 2, 0]),
        ([1, 3, 0, 2], [0, 1, 2, 3, 0, 1, 3, 1, 3, 1]),
        ([0, 0, 0, 0], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_turns_go_round_in_one_order(nums_turns: list[int], order: list[int]) -> None:
    log = Log()
    got = bounded(log.turns, [log.task(i, n) for i, n in enumerate(nums_turns)])
    assert log.order == order
    assert got == [f"result {i}" for i in range(len(nums_turns))]
    assert log.clashes == 0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_any_numbers_of_turns_go_round_in_one_order(nums_turns: list[int]) -> None:
    log = Log()
    got = bounded(log.turns, [log.task(i, n) for i, n in enumerate(nums_turns)])
    assert log.order == rounds(nums_turns)
    assert got == [f"result {i}" for i in range(len(nums_turns))]
    assert (log.clashes, log.running) == (0, set())


def test_every_turn_is_announced_in_its_own_thread() -> None:
    log = Log()
    bounded(log.turns, [log.task(i, n) for i, n in enumerate((2, 0, 2))])
    assert [number for number, _ in log.announced] == log.order == [0, 1, 2, 0, 2, 0, 2]
    assert all(log.threads[number] == {thread} for number, thread in log.announced)
    assert len(set.union(*log.threads.values())) == 3


def test_the_first_one_runs_in_the_callers_thread() -> None:
    turns, seen = Turns(lambda _: None), list[str]()

    def task() -> None:
        seen.append(threading.current_thread().name)
        turns.give_up_turn()
        seen.append(threading.current_thread().name)

    bounded(turns, [task] * 2)
    assert seen[0] == seen[2] == "caller"
    assert seen[1] == seen[3] != "caller"


def test_one_alone_gives_up_its_turn_to_nobody() -> None:
    log = Log()
    assert bounded(log.turns, [log.task(0, 3)]) == ["result 0"]
    assert [number for number, _ in log.announced] == [0]


def test_none_is_no_result() -> None:
    log = Log()
    tasks = [log.task(0, 1), lambda: log.turns.give_up_turn(), log.task(2, 1)]
    assert bounded(log.turns, tasks) == ["result 0", "result 2"]


# ---- never two at once ----------------------------------------------------------------------


def test_a_shared_counter_needs_no_lock() -> None:
    """Each reads, sleeps and writes back: any overlap would lose an increment."""
    turns, counter = Turns(lambda _: None), [0]

    def task() -> int:
        for _ in range(20):
            before = counter[0]
            time.sleep(random.random() / 5000)
            counter[0] = before + 1
            turns.give_up_turn()
        return 0

    bounded(turns, [task] * 4)
    assert counter == [80]


# ---- failures -------------------------------------------------------------------------------


class Broken(Exception):
    """What a step raises."""


@pytest.mark.parametrize("error", [Broken("x"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("at_turn", [0, 1, 2])
@pytest.mark.parametrize(("count", "broken"), [(1, 0), (2, 0), (2, 1), (3, 1), (4, 0), (4, 3)])
def test_a_failure_ends_all_and_is_raised(
    count: int, broken: int, at_turn: int, error: BaseException
) -> None:
    log = Log()
    tasks = [log.task(i, at_turn, error) if i == broken else log.task(i, 4) for i in range(count)]
    with pytest.raises(type(error)) as raised:
        bounded(log.turns, tasks)
    assert raised.value is error
    assert log.order == rounds([4] * count)[: at_turn * count + broken + 1], "nobody went on"
    assert (log.running, log.clashes) == (set(), 0), "and nobody is in the middle of it"


def test_a_failure_after_others_are_through() -> None:
    log = Log()
    with pytest.raises(Broken):
        bounded(log.turns, [log.task(0, 0), log.task(1, 3, Broken()), log.task(2, 1)])
    assert log.order == [0, 1, 2, 1, 2, 1, 1]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_of_several_failures_the_first_is_raised(first: int) -> None:
    """The others are ended, and fail in turn while they clean up."""
    log = Log()
    tasks = [
        log.task(i, 1, Broken(str(i))) if i == first else log.task(i, 4, at_end=Broken(str(i)))
        for i in range(3)
    ]
    with pytest.raises(Broken, match=rf"^{first}$"):
        bounded(log.turns, tasks)
    assert log.running == set()


def test_all_fail_in_the_same_round() -> None:
    log = Log()
    with pytest.raises(Broken, match=r"^0$"):
        bounded(log.turns, [log.task(i, 2, Broken(str(i))) for i in range(4)])
    assert log.order == [0, 1, 2, 3] * 2 + [0], "the others did not come to it"


def test_a_task_that_never_had_a_turn_does_not_begin() -> None:
    log = Log()
    with pytest.raises(Broken):
        bounded(log.turns, [log.task(0, 0, Broken()), log.task(1, 1), log.task(2, 1)])
    assert log.order == [0]
    assert log.threads.keys() == {0}


# ---- again and again ------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_it_can_be_used_again_after_a_failure(broken: int) -> None:
    log = Log()
    for _ in range(5):
        log.order.clear()
        failing = [log.task(i, 1, Broken() if i == broken else None) for i in range(3)]
        with pytest.raises(Broken):
            bounded(log.turns, failing)
        log.order.clear()
        assert bounded(log.turns, [log.task(i, 2) for i in range(3)]) == [
            "result 0", "result 1", "result 2",
        ]  # fmt: skip
        assert log.order == [0, 1, 2] * 3
        assert (log.running, log.clashes) == (set(), 0)


def test_fewer_tasks_than_before() -> None:
    log = Log()
    for count in (4, 2, 1, 3):
        log.order.clear()
        bounded(log.turns, [log.task(i, 1) for i in range(count)])
        assert log.order == [*range(count)] * 2


def test_no_thread_is_made_for_every_step() -> None:
    log = Log()
    bounded(log.turns, [log.task(i, 1) for i in range(3)])
    before = {t.ident for t in threading.enumerate()}
    for _ in range(20):
        bounded(log.turns, [log.task(i, 1) for i in range(3)])
    pool = {t.ident for t in threading.enumerate() if t.name.startswith("microbatch")}
    assert pool <= before
