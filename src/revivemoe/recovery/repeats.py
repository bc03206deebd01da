"""Faults that are redone in place once and laid to a rank when they come again."""

from revivemoe.ids import Epoch, RankId
from revivemoe.messages.reports import PRODUCERS, NonFinite
from revivemoe.recovery.faults import Fault

LAST_LAYER = 1 << 30


class Links:
    """Communication failures that nobody was accused for.

    Both ends of a broken link see an error; all others only wait. Twice in a row between the same
    two, one of them has to go: the one with the higher id, so that everybody would choose alike.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._last: tuple[frozenset[RankId], float] | None = None

    def failed(self, reporters: frozenset[RankId], now: float) -> Fault | None:
        """These ranks saw an error in one epoch. Whom to isolate, or None to try again."""
        last, self._last = self._last, (reporters, now)
        again = last is not None and last[0] == reporters and now - last[1] <= self._window_s
        if not again or len(reporters) != 2:
            return None
        one, other = sorted(reporters)
        detail = f"the link between ranks {one} and {other} failed twice in a row"
        return Fault(other, "communication", detail)


class Numbers:
    """Non-finite numbers, laid to the first stage with finite input and non-finite output."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._claims: list[NonFinite] = []
        self._epoch = Epoch(-1)
        self._blamed: dict[RankId, float] = {}
        """When each rank last was the first producer."""

    def claim(self, report: NonFinite) -> None:
        """A rank has met non-finite numbers in a step."""
        if report.epoch > self._epoch:
            self._epoch, self._claims = report.epoch, []
        if report.epoch == self._epoch:
            self._claims.append(report)

    def settle(self, now: float) -> Fault | None:
        """All claims of the step are in. Whom to isolate, or None to redo the step."""
        claims, self._claims = self._claims, []
        producers = [c for c in claims if c.produced_here]
        if not producers:
            return None
        first = min(producers, key=_place)
        before = self._blamed.get(first.rank)
        self._blamed[first.rank] = now
        if before is None or now - before > self._window_s:
            return None
        where = first.phase if first.layer < 0 else f"{first.phase}, layer {first.layer}"
        detail = f"turned finite numbers into NaN or infinity twice ({where}, step {first.step})"
        return Fault(first.rank, "non_finite", detail, signature=f"non_finite:{where}")

    def forget(self, rank: RankId) -> None:
        """The rank is out, or has a new process."""
        self._blamed.pop(rank, None)


def _place(claim: NonFinite) -> tuple[int, int, int]:
    layer = claim.layer if claim.layer >= 0 else LAST_LAYER
    return layer, PRODUCERS.index(claim.phase), claim.rank
