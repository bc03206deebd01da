"""What goes wrong again and again: counted, and told of now and then."""

import sys
from collections.abc import Callable

TELL_EVERY_S = 10.0


class Complaints:
    """Of one kind, such as messages that cannot be decoded."""

    def __init__(self, what: str, tell: Callable[[str, Exception], None]) -> None:
        """`what`: has gone wrong, in the plural. `tell`: is given a line, and the last error."""
        self.count = 0
        self._what, self._tell = what, tell
        self._told = 0
        self._told_at: float | None = None

    def add(self, error: Exception, now: float) -> None:
        """One more. The first is told of at once."""
        self.count += 1
        if self._told_at is None or now >= self._told_at + TELL_EVERY_S:
            self._tell(f"{self._what}: {self.count - self._told}, the last: {error!r}", error)
            self._told, self._told_at = self.count, now


def say(line: str, error: Exception) -> None:
    """How a rank tells of it."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
