"""One bounded, interruptible wait, shared by all transports."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from revivemoe.comm.fence import CommunicationFailed, DomainLeft, FenceFlag
from revivemoe.ids import Epoch, RankId

SPIN_S = 0.02
"""How long a wait yields its core before it starts to sleep. Ranks that share cores, and wait for
peers with more experts to run, were slower by a tenth with 2 ms and by a fifth without.
(`sched_yield` keeps the GIL: another thread of the rank gets it within Python's 5 ms.)"""
SLEEP_S = 100e-6


@dataclass
class Waiter:
    """Waits inside one domain: each ends by success, the fence or the time limit. Never later."""

    _fence: FenceFlag
    _epoch: Epoch
    _timeout_s: float
    _on_wait: Callable[[bool], None] = lambda waiting: None
    waited_s: float = 0.0
    """Seconds spent waiting for peers so far."""

    @property
    def fenced(self) -> bool:
        """Whether this epoch has been fenced."""
        return self._fence.covers(self._epoch)

    def check_fence(self) -> None:
        """Raise DomainLeft if this epoch has been fenced."""
        if self.fenced:
            raise DomainLeft(f"epoch {self._epoch} is fenced (by epoch {self._fence.epoch})")

    def until(
        self,
        ready: Callable[[], bool],
        waited_for: str,
        silent: Callable[[], tuple[RankId, ...]],
    ) -> None:
        """Return once `ready()`.

        Raises DomainLeft as soon as the epoch is fenced, CommunicationFailed after `timeout_s`,
        naming `waited_for` and the ranks that `silent()` lists.
        """
        self.check_fence()
        if ready():
            return
        started = time.monotonic()
        self._on_wait(True)
        try:
            while not ready():
                self.check_fence()
                elapsed = time.monotonic() - started
                if elapsed >= self._timeout_s:
                    detail = f"not complete after {self._timeout_s:g} s in epoch {self._epoch}"
                    raise CommunicationFailed(waited_for, silent(), detail)
                if elapsed < SPIN_S:
                    os.sched_yield()
                else:
                    time.sleep(SLEEP_S)
        finally:
            self._on_wait(False)
            self.waited_s += time.monotonic() - started
