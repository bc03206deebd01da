"""Who is accused. Pure: facts come in with their times, accusations come out.

| evidence                                        | meaning                                      |
|-------------------------------------------------|----------------------------------------------|
| its process exited                              | gone, at once                                |
| no message for `suspect_after_s`                | suspect                                      |
| ... for `accuse_after_s`                        | stopped: accused (while it does what it has  |
|                                                 | announced to take long: after that)          |
| its step loop is at its own work for too long   | hung: accused. By its own clock, relative to |
|                                                 | what its rows predict                        |
| it waits for its peers                          | nothing: never the culprit, unless all wait  |
|                                                 | and it does so where the others have been    |
| more than half of all ranks are silent          | the engine suspects itself first             |

The engine drains its inbox before it asks, and tells of every stall of its own.
"""

from dataclasses import dataclass

from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import STEP_PHASES, Activity, Heartbeat
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy

_UNKNOWN = Activity()
CONFIRMED = 2
"""Heartbeats that tell of overdue work before it is believed: after a stall of the whole machine
the control thread may run again just before the step loop does."""


@dataclass(slots=True)
class Vitals:
    """The last evidence of life of one rank's present process."""

    incarnation: Incarnation
    last_seen: float
    exited: bool = False
    spoken: bool = False
    """Whether it has said anything yet. A process that loads its first modules may be silent."""
    progress: int = -1
    activity: Activity = _UNKNOWN
    overdue_beats: int = 0
    """Heartbeats in a row that told of the same overdue work."""


class Detector:
    """Keeps the vitals of every rank. Times are seconds of one monotonic clock, passed in."""

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._vitals: dict[RankId, Vitals] = {}
        self._doubt_since: float | None = None
        """Since when more than half of the ranks are silent at once."""

    # ---- facts -------------------------------------------------------------------------------

    def launched(self, rank: RankId, incarnation: Incarnation, now: float) -> None:
        """A process was started for this rank."""
        self._vitals[rank] = Vitals(incarnation, now)

    def heard(self, rank: RankId, incarnation: Incarnation, now: float) -> None:
        """Any message of the rank's present process is evidence of life."""
        vitals = self._vitals.get(rank)
        if vitals is not None and vitals.incarnation == incarnation and not vitals.exited:
            vitals.last_seen, vitals.spoken = now, True

    def beat(self, heartbeat: Heartbeat) -> None:
        """What the rank's step loop is doing."""
        vitals = self._vitals.get(heartbeat.rank)
        if vitals is None or vitals.incarnation != heartbeat.incarnation:
            return
        activity, same = heartbeat.activity, heartbeat.progress == vitals.progress
        limit_s = self._limit_s(activity)
        overdue = limit_s is not None and activity.since_s > limit_s
        vitals.progress, vitals.activity = heartbeat.progress, activity
        vitals.overdue_beats = (vitals.overdue_beats if same else 0) + 1 if overdue else 0

    def exited(
        self, rank: RankId, incarnation: Incarnation, detail: str, now: float
    ) -> Fault | None:
        """The process exited. None if it was not the rank's present one, or is known already."""
        vitals = self._vitals.get(rank)
        if vitals is None or vitals.incarnation != incarnation or vitals.exited:
            return None
        vitals.exited = True
        return Fault(rank, "process_exit", detail, detect_s=max(0.0, now - vitals.last_seen))

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long: what it did not hear, it could not hear."""
        for vitals in self._vitals.values():
            vitals.last_seen += seconds

    # ---- judgement ---------------------------------------------------------------------------

    def judge(self, watched: frozenset[RankId], now: float) -> list[Fault]:
        """Accusations among the ranks `watched` (members that are not accused yet)."""
        assert watched <= self._vitals.keys(), "a rank is watched that never had a process"
        alive = {r: v for r, v in self._vitals.items() if r in watched and not v.exited}
        hung = [fault for rank in sorted(alive) if (fault := self._hung(rank, now)) is not None]
        hung = hung or self._left_behind(alive, now)
        silent = [rank for rank in sorted(alive) if self.suspect(rank, now)]
        if self._in_doubt(len(silent), len(alive), now):
            return hung
        gone = [r for r in silent if self._silence_s(r, now) > self._patience_s(r)]
        return hung + [self._silent_fault(rank, now) for rank in gone]

    def _patience_s(self, rank: RankId) -> float:
        """Silence that is borne: what is known to take long may hold the interpreter, too."""
        activity = self._vitals[rank].activity
        announced_s = activity.budget_s if activity.kind == "announced" else None
        return max(self._policy.accuse_after_s, announced_s or 0.0)

    def _in_doubt(self, num_silent: int, num_alive: int, now: float) -> bool:
        """Whether to blame the engine itself: for as long as a suspicion lasts, not for ever."""
        if 2 * num_silent <= num_alive:
            self._doubt_since = None
            return False
        if self._doubt_since is None:
            self._doubt_since = now
        return now - self._doubt_since <= self._policy.doubt_s

    def _silent_fault(self, rank: RankId, now: float) -> Fault:
        silence_s = self._silence_s(rank, now)
        detail = f"nothing heard for {silence_s:.2f} s: its process is stopped or stuck"
        return Fault(rank, "heartbeat", detail, detect_s=silence_s)

    def _hung(self, rank: RankId, now: float) -> Fault | None:
        vitals = self._vitals[rank]
        activity = vitals.activity
        limit_s = self._limit_s(activity)
        if limit_s is None or vitals.overdue_beats < CONFIRMED:
            return None
        place = _where(activity)
        detail = (
            f"no progress for {activity.since_s:.2f} s at its own work ({place or activity.kind}, "
            f"step {activity.step}), {limit_s:.2f} s would have been much"
        )
        silence_s = max(0.0, now - vitals.last_seen)
        signature = f"hang:{place}"
        return Fault(
            rank, "hang", detail, detect_s=activity.since_s + silence_s, signature=signature
        )

    def _left_behind(self, alive: dict[RankId, Vitals], now: float) -> list[Fault]:
        """Ranks that wait for what the others have long given them: they are stuck in the wait."""
        waits = {rank: v.activity for rank, v in alive.items()}
        limit_s = self._policy.hang_after_s
        stuck = [a for a in waits.values() if a.kind == "waiting" and a.since_s > limit_s]
        if len(stuck) < len(waits) or any(a.name not in STEP_PHASES for a in stuck):
            return []
        front = max((_place(a) for a in waits.values()), default=None)
        behind = [rank for rank, a in sorted(waits.items()) if _place(a) != front]
        if 2 * len(behind) >= len(waits):
            return []  # no telling who is right
        return [
            Fault(
                rank,
                "hang",
                f"waits for {waits[rank].since_s:.2f} s in {_where(waits[rank])} for what all "
                "others have given: they are further",
                detect_s=waits[rank].since_s,
                signature=f"hang:{_where(waits[rank])}",
            )
            for rank in behind
        ]

    def _limit_s(self, activity: Activity) -> float | None:
        """How long the step loop may stay where it is; None: as long as it takes the others."""
        policy = self._policy
        match activity.kind:
            case "waiting":
                return None
            case "working":
                if activity.budget_s is None:
                    return policy.first_work_s
                return max(policy.hang_after_s, policy.hang_factor * activity.budget_s)
            case "announced":
                return max(policy.hang_after_s, activity.budget_s or policy.first_work_s)
            case _:
                return policy.hang_after_s

    # ---- for others to see -------------------------------------------------------------------

    def age_s(self, rank: RankId, now: float) -> float | None:
        """Seconds since the last evidence of life; None if the rank never had a process."""
        return None if rank not in self._vitals else self._silence_s(rank, now)

    def suspect(self, rank: RankId, now: float) -> bool:
        """Silent for longer than is normal. Not an accusation."""
        vitals = self._vitals.get(rank)
        if vitals is None or not vitals.spoken:
            return False
        return self._silence_s(rank, now) > self._policy.suspect_after_s

    def gone(self, rank: RankId) -> bool:
        """Whether the rank's present process is known to have exited."""
        return self._vitals[rank].exited

    def _silence_s(self, rank: RankId, now: float) -> float:
        return max(0.0, now - self._vitals[rank].last_seen)


BEHIND_ALL_LAYERS = 1 << 30


def _place(activity: Activity) -> tuple[int, int, int]:
    """Places of a step in order."""
    layer = activity.layer
    if activity.name in ("sample", "commit"):
        layer = BEHIND_ALL_LAYERS
    phase = STEP_PHASES.index(activity.name) if activity.name in STEP_PHASES else 0
    return activity.step, layer, phase


def _where(activity: Activity) -> str:
    return activity.name if activity.layer < 0 else f"{activity.name}, layer {activity.layer}"
