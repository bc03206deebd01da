"""Polls every source in a thread of its own and hands reports to one callback."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

from revivemoe.health.source import HealthSource
from revivemoe.recovery.faults import DeviceReport

log = logging.getLogger("revivemoe.health")

MAX_BACKOFF_S = 60.0
"""Between two tries of a source that keeps failing."""
STOP_TIMEOUT_S = 5.0
"""For all threads together to end; a source stuck in its driver is left behind, as a daemon."""


class HealthMonitor:
    """`with HealthMonitor(sources, on_report): ...`; owns the sources and closes them.

    `on_report` is called from the sources' threads. A source that raises is logged once, tried
    again after 2, 4, 8 ... intervals, and logged again when it answers: it never ends anything.
    What `on_report` refuses by raising is offered again, in order.
    """

    def __init__(
        self,
        sources: Sequence[HealthSource],
        on_report: Callable[[DeviceReport], None],
        interval_s: float = 1.0,
        max_backoff_s: float = MAX_BACKOFF_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s {interval_s} is out of range: above 0")
        self._on_report = on_report
        self._interval_s = interval_s
        self._max_backoff_s = max_backoff_s
        self._stop_timeout_s = stop_timeout_s
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(source,), name=f"health-{source.name}", daemon=True
            )
            for source in sources
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all threads; returns within `stop_timeout_s`. May be called twice."""
        self._stop.set()
        share_s = self._stop_timeout_s / max(1, len(self._threads))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(share_s)
            if thread.is_alive():
                log.warning("%s did not end within %.1f s: left behind", thread.name, share_s)

    def _run(self, source: HealthSource) -> None:
        """One source's thread: poll, deliver, wait; at the end close the source."""
        waiting: deque[DeviceReport] = deque()
        failures = 0
        while not self._stop.wait(self._pause_s(failures)):
            error = self._turn(source, waiting)
            if error is not None and failures == 0:
                log.warning("%s: %s; trying again", source.name, one_line(error))
            if error is None and failures > 0:
                log.info("%s: answers again after %d failures", source.name, failures)
            failures = 0 if error is None else failures + 1
        try:
            source.close()
        except Exception as error:
            log.warning("%s: while closing: %s", source.name, one_line(error))

    def _turn(self, source: HealthSource, waiting: deque[DeviceReport]) -> Exception | None:
        """One poll. The broad catch is the boundary of the thread: drivers and servers fail in
        ways nobody can list, and none of them may reach the engine."""
        try:
            waiting.extend(source.poll())
            while waiting:
                self._on_report(waiting[0])
                waiting.popleft()
        except Exception as error:
            return error
        return None

    def _pause_s(self, failures: int) -> float:
        return float(min(self._interval_s * 2 ** min(failures, 30), self._max_backoff_s))


def one_line(error: Exception) -> str:
    """Type and the beginning of the message: some clients put whole HTTP bodies in there."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
