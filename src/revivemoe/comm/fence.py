"""The fence: how a rank leaves a domain without the death or cooperation of anybody in it."""

import threading
from collections.abc import Sequence

from revivemoe.core.effects import Broken, Left
from revivemoe.ids import Epoch, RankId


class DomainLeft(Left):
    """The epoch of this domain is over. Not an error: leave, roll back, await the next epoch."""


class CommunicationFailed(Broken):
    """A transport failed or ran out of time. A symptom, never an accusation.

    `waited_for` says what did not come; `silent` are the ranks from which nothing had come by then
    (with a transport that cannot tell them apart: every other member). A rank may be silent
    because it, too, waits for another.
    """

    def __init__(self, waited_for: str, silent: Sequence[RankId], detail: str) -> None:
        self.waited_for = waited_for
        self.silent = tuple(silent)
        self.detail = detail
        ranks = ", ".join(str(r) for r in self.silent) or "nobody"
        super().__init__(f"{waited_for}: {detail}; nothing from rank {ranks}")


class FenceFlag:
    """Highest epoch fenced so far. A control thread raises it; every wait in a domain polls it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = -1

    @property
    def epoch(self) -> int:
        """Highest fenced epoch; -1 before the first fence."""
        return self._epoch

    def raise_to(self, epoch: Epoch) -> None:
        """Fence every epoch below `epoch`. Lower values than an earlier one change nothing."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)

    def covers(self, epoch: Epoch) -> bool:
        """Whether domains of `epoch` must be left."""
        return self._epoch > epoch
