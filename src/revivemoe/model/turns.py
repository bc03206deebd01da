"""Micro-batches take turns: a thread for each, and exactly one of them runs at any time.

The place where a model calls its experts is synchronous: what comes back must be the experts'
result. So that another micro-batch can compute while one waits for its experts, each has a thread
of its own, which gives up its turn at that place. Strict hand-over, round and round in one order:
nothing in a rank is ever touched by two of them at once.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class _Abandoned(Exception):
    """Another micro-batch of the step has failed: this one goes no further."""


class Turns:
    """Runs the micro-batches of one rank's steps. The first one runs in the caller's thread."""

    def __init__(self, on_turn: Callable[[int], None]) -> None:
        """`on_turn`: told the number of the micro-batch whose turn begins, in its own thread."""
        self._on_turn = on_turn
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0
        self._doors: list[threading.Semaphore] = []
        self._running: list[bool] = []
        self._present = 0
        self._failure: BaseException | None = None

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of all tasks, which call `give_up_turn` alike. Raises what the first one to
        fail has raised, once none runs any more.
        """
        self._doors = [threading.Semaphore(0) for _ in tasks]
        self._running = [True] * len(tasks)
        self._present, self._failure = 0, None
        others = [
            self._threads(len(tasks)).submit(self._run_one, number, task)
            for number, task in enumerate(tasks[1:], 1)
        ]
        results = [self._finish(0, tasks[0]), *(other.result() for other in others)]
        if self._failure is not None:
            raise self._failure
        return [result for result in results if result is not None]

    def give_up_turn(self) -> None:
        """Let the other micro-batches run up to the same place; return when it is our turn again.

        The wait lasts as long as the others' work, whose own waits are bounded.
        """
        me = self._present
        if self._pass_on():
            self._doors[me].acquire()
            self._begin_turn(me)

    def _threads(self, count: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_size < count - 1:
            self._pool = ThreadPoolExecutor(max(1, count - 1), "microbatch")
            self._pool_size = count - 1
        return self._pool

    def _run_one(self, number: int, task: Callable[[], Result]) -> Result | None:
        self._doors[number].acquire()
        return self._finish(number, task)

    def _finish(self, number: int, task: Callable[[], Result]) -> Result | None:
        try:
            self._begin_turn(number)
            return task()
        except _Abandoned:
            return None
        except BaseException as failure:
            if self._failure is None:
                self._failure = failure
            return None
        finally:
            self._running[number] = False
            self._pass_on()

    def _pass_on(self) -> bool:
        """Open the next one's door. Returns whether there is another one."""
        count = len(self._running)
        for step in range(1, count):
            number = (self._present + step) % count
            if self._running[number]:
                self._present = number
                self._doors[number].release()
                return True
        return False

    def _begin_turn(self, number: int) -> None:
        self._present = number
        if self._failure is not None:
            raise _Abandoned
        self._on_turn(number)
