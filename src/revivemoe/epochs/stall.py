"""How long the streams stood still for a change of epoch. Pure; times are passed in."""

from revivemoe.epochs.record import RecoveryRecord
from revivemoe.ids import Epoch


class StallClock:
    """Times a stall from the last step committed in the old epoch to the first in the new."""

    def __init__(self) -> None:
        self._last_commit: float | None = None
        self._record: RecoveryRecord | None = None
        """Of a change whose first step in the new epoch has not been seen."""

    @property
    def runs(self) -> bool:
        return self._record is not None

    def begin(self, record: RecoveryRecord, busy: bool) -> None:
        """A change of epoch begins. Nothing stalls if nobody has work."""
        if record.last_old_step is None and busy:
            record.last_old_step = self._last_commit
        record.first_new_step = None  # if it had come: that epoch is at its end, too
        self._record = record if busy else None

    def committed(self, epoch: Epoch, now: float) -> None:
        """A step of this epoch has been committed."""
        assert self._last_commit is None or now >= self._last_commit, "time runs backwards"
        record, self._last_commit = self._record, now
        if record is None:
            return
        if epoch < record.epoch:
            record.last_old_step = now
        elif record.first_new_step is None:
            record.first_new_step = now
            self._record = None
