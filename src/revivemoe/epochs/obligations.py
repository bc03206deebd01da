"""Whatever is outstanding: what, for whom, until when, and what happens then."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

Who = int | str | None
AGAIN_S = 5.0
"""After this time an obligation lapses again whose lapse has raised."""


@dataclass(frozen=True)
class Obligation:
    """Something that somebody still owes. Times are monotonic seconds."""

    what: str
    who: Who
    """A rank, or whatever else tells those of one kind apart."""
    since: float
    due: float
    then: str
    """What happens when it is not met, in words."""
    lapse: Callable[[float], None]
    """... and in deed; is given the time."""

    def __post_init__(self) -> None:
        assert self.due < float("inf"), f"{self.what} of {self.who} is owed for ever"
        assert self.due >= self.since, f"{self.what} of {self.who} was due before it was owed"
        assert self.then, f"nobody says what happens without {self.what} of {self.who}"


class Obligations:
    """At most one of each kind for each debtor."""

    def __init__(self) -> None:
        self._owed: dict[tuple[str, Who], Obligation] = {}

    def owe(self, obligation: Obligation) -> None:
        """Enter it; one of the same kind and debtor is replaced."""
        self._owed[obligation.what, obligation.who] = obligation

    def met(self, what: str, who: Who) -> bool:
        """It is done, or not wanted any more. Returns whether it was owed."""
        return self._owed.pop((what, who), None) is not None

    def owed(self, what: str, who: Who) -> bool:
        return (what, who) in self._owed

    def see_to_one(self, now: float) -> bool:
        """Let the oldest one whose time has come lapse. False: there is none.

        It is struck out first, for `lapse` may enter another; if that raises, it is due again soon.
        """
        late = [o for o in self._owed.values() if now >= o.due]
        if not late:
            return False
        oldest = min(late, key=lambda o: o.due)
        del self._owed[oldest.what, oldest.who]
        try:
            oldest.lapse(now)
        except Exception:
            self._owed.setdefault((oldest.what, oldest.who), replace(oldest, due=now + AGAIN_S))
            raise
        return True

    def postpone(self, seconds: float) -> None:
        """The host itself stood still for so long: nobody else is late by that."""
        self._owed = {k: replace(o, due=o.due + seconds) for k, o in self._owed.items()}

    def __len__(self) -> int:
        return len(self._owed)

    def __iter__(self) -> Iterator[Obligation]:
        return iter(sorted(self._owed.values(), key=lambda o: (o.due, o.what, str(o.who))))
