"""Communication errors: symptoms that accuse nobody by themselves."""

from revivemoe.ids import RankId
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repeats import Links


class Symptoms:
    """What members saw in the present epoch, until a fault explains it or its time has come."""

    def __init__(self, policy: Policy) -> None:
        self._grace_s = policy.symptom_grace_s
        self._links = Links(policy.repeat_window_s)
        self._since: float | None = None
        self._reporters: set[RankId] = set()

    def reported(self, rank: RankId, now: float) -> None:
        """A member's communication failed."""
        self._reporters.add(rank)
        if self._since is None:
            self._since = now

    def explained(self) -> None:
        """A new epoch begins, for whatever reason."""
        self._since = None
        self._reporters.clear()

    def unexplained(self, now: float) -> bool:
        """Whether nobody has been accused within the grace time."""
        return self._since is not None and now - self._since > self._grace_s

    def blame(self, now: float) -> list[Fault]:
        """Once unexplained: nobody, or one end of a link that has failed twice in a row."""
        fault = self._links.failed(frozenset(self._reporters), now)
        return [] if fault is None else [fault]

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long."""
        if self._since is not None:
            self._since += seconds
