"""What has been tried lately, so that recovery gives up in the end. Pure; times are passed in."""

from collections import deque

from revivemoe.ids import Epoch
from revivemoe.recovery.policy import Policy

KEPT = 256


class Attempts:
    """Recoveries, restarts, domains and loads, and which of them came to nothing."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.domain_failures = 0
        """Domains in a row that did not come about."""
        self._starts: deque[float] = deque(maxlen=KEPT)
        """When recent recoveries began."""
        self._counted = False
        """Whether the change under way counts towards the policy's limit."""
        self._restarts: dict[Epoch, float] = {}
        """When ranks were restarted, by the epoch it was for."""
        self._load_failed_at: float | None = None

    def planned(self) -> None:
        """A planned change begins: it counts for nothing."""
        self._counted = False

    def recovery(self, now: float, under_way: bool) -> None:
        """A recovery begins, or the one under way goes on with one more fault."""
        if not (under_way and self._counted):
            self._starts.append(now)
            self._counted = True

    def again(self, now: float) -> None:
        """The one under way begins again from the fence: that is an attempt, too."""
        self._starts.append(now)

    def forward(self) -> None:
        """A step of the present epoch was committed: whatever was tried before it has helped."""
        self._starts.clear()
        self._restarts.clear()

    def recent(self, now: float, under_way: bool) -> int:
        """Recoveries in a row that brought no step forward, within the window and without the one
        under way. Planned changes are not measured by them."""
        if under_way and not self._counted:
            return 0
        within = sum(t >= now - self._policy.window_s for t in self._starts)
        return max(0, within - int(under_way))  # one under way may have begun before the window

    def restarted(self, epoch: Epoch, now: float) -> float:
        """Ranks are started anew on the way to this epoch: what was in vain before is settled.

        Returns how long that is to wait, seconds: the first is at once; those after it, as the ones
        before have brought nothing, wait ever longer. A plan that is made anew begins no new wait.
        """
        first_at = self._restarts.setdefault(epoch, now)
        self._starts.clear()
        self.domain_failures = 0
        before = self.recent_restarts(now, epoch)
        first_s, longest_s = self._policy.rejoin_after_s, self._policy.rejoin_at_most_s
        wait_s = min(longest_s, first_s * 2.0 ** min(before - 1, 64)) if before else 0.0
        return max(0.0, first_at + wait_s - now)

    def recent_restarts(self, now: float, under_way: Epoch | None) -> int:
        """Restarts in a row that brought no step forward, without the one on the way to the epoch
        `under_way`: whether that is in vain is not known yet."""
        since = now - self._policy.window_s
        return sum(at >= since for epoch, at in self._restarts.items() if epoch != under_way)

    def load_failed(self, now: float) -> None:
        """A rank could not load experts before a resume."""
        self._load_failed_at = now

    def can_load(self, now: float) -> bool:
        """False while loading experts has just failed."""
        at = self._load_failed_at
        return at is None or now - at > self._policy.repeat_window_s
