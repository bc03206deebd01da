"""What recovery may do, in which order, and how long it may take."""

from dataclasses import dataclass
from typing import Literal

LevelAction = Literal["log", "watch", "retry", "drain", "isolate"]
LEVEL_ACTIONS: tuple[LevelAction, ...] = ("log", "watch", "retry", "drain", "isolate")

Repair = Literal["reload", "role_switch", "mask", "restart"]
REPAIRS: tuple[Repair, ...] = ("reload", "role_switch", "mask", "restart")

DEFAULT_LEVELS: tuple[LevelAction, ...] = ("log", "watch", "retry", "drain", "isolate", "isolate")
"""For the device fault levels L1 .. L6: NotHandleFault, RestartRequest, RestartBusiness,
FreeRestartNPU, RestartNPU, SeparateNPU in Ascend's public documentation. The paper: L1 needs no
action, L6 isolates."""


@dataclass(frozen=True)
class Policy:
    """Bounds, not mechanism. All times in seconds."""

    # ---- experts
    repair: tuple[Repair, ...] = REPAIRS
    """What to try, in this order, for experts without a live replica. (One with a live replica is
    dropped from the map, always.) What is not named is not done."""
    max_missing_fraction: float = 1 / 32
    """Experts of one layer that may be masked (the paper finds accuracy to hold up to 1/32)."""
    serve_masked_meanwhile: bool = False
    """Go on at once with experts masked (within the bound) while they are reloaded, or while a role
    switch proceeds in the background, instead of waiting for it."""
    restore_redundancy: bool = True
    """Fill empty slots with second replicas of experts that had one, beside the steps, so that the
    next loss needs no reload."""

    # ---- how much is too much
    max_recoveries: int = 8
    """So many recoveries in a row, within the window, that brought no step forward: restart all
    ranks behind the streams. Those that the instance came through do not count."""
    window_s: float = 600.0
    max_restarts: int = 3
    """Restarts in a row, within the window, that brought no step forward: stop and say so, as a
    supervisor would."""
    max_retries: int = 3
    """More retries than this that one device asked for, within the window: it is drained."""

    # ---- coming back
    auto_rejoin: bool = True
    """Start lost ranks again by themselves (not on a device that is bad, nor against an operator),
    bring them back to the roles they had, and missing experts with them."""
    rejoin_after_s: float = 2.0
    """The first time; twice as long every further time in a row, with some jitter."""
    rejoin_at_most_s: float = 60.0
    """The longest wait between two attempts."""
    max_rejoins: int = 10
    """Attempts in a row before a rank is left to the operator."""
    settled_after_s: float = 60.0
    """A rank that has been a member for so long has come back: its attempts are forgotten."""

    # ---- deadlines of the stages
    fence_timeout_s: float = 10.0
    """For every survivor to roll back and acknowledge. A rank inside one long forward needs it."""
    boundary_timeout_s: float = 5.0
    """For the members to stop at a step boundary together; after that they are fenced hard."""
    resume_timeout_s: float = 20.0
    """For every member to agree on the first step of the new epoch; loading not counted."""
    reload_timeout_s: float = 120.0
    """For experts to be loaded into slots before the first step of an epoch."""
    restart_timeout_s: float = 600.0
    """For ranks that are restarted to be ready."""
    spawn_timeout_s: float = 60.0
    """For a process to come into being, and for its first word."""
    join_timeout_s: float = 120.0
    """For a rank that has loaded to be taken in."""
    leave_timeout_s: float = 10.0
    """For a rank that was told to stop to be gone; then it is killed."""
    corpse_timeout_s: float = 120.0
    """For a killed process to be gone (a driver may take long to free a device's memory). A plan
    that needs its rank waits so long for it."""
    trial_timeout_s: float = 60.0
    """For a suspect to have its turn, and to get on by a token; then it is cleared."""
    drain_timeout_s: float = 30.0
    """For the sequences of a rank being drained to be warm elsewhere; then they move anyway."""

    # ---- detection
    suspect_after_s: float = 1.0
    """Silence after which a rank is suspect (heartbeats come every 0.1 s)."""
    accuse_after_s: float = 1.3
    """Silence after which it is accused."""
    doubt_s: float = 5.0
    """How long the silence of more than half of all ranks at once is laid to the engine's own host
    rather than to them."""
    hang_after_s: float = 1.0
    """Least time without progress that is a hang."""
    hang_factor: float = 5.0
    """Work is overdue after this many times what its rows predict, if that is longer."""
    first_work_s: float = 30.0
    """What work of a kind never seen before may take (the first step warms caches up)."""
    symptom_grace_s: float = 1.0
    """How long an aborted step may wait for the detector to name a rank, before the same members
    are given a new domain."""
    repeat_window_s: float = 60.0
    """A link that fails, or numbers that turn non-finite, twice within this time on the same ranks
    is a fault of a rank."""
    slow_factor: float = 3.0
    """A rank is slow if its own work takes this many times what it takes its peers."""
    slow_after_s: float = 3.0
    """... for so long."""
    isolate_slow: bool = False
    """Whether a slow rank is taken out (at a step boundary), or only reported."""

    # ---- device health
    levels: tuple[LevelAction, ...] = DEFAULT_LEVELS
    """Action for a device fault of level L1 .. L6."""
    codes: tuple[tuple[str, int], ...] = ()
    """Fault codes, each with the level that it has here, whatever its source says; 0: ignored."""

    def level_of(self, code: str, level: int) -> int:
        """The level (1 to 6) of a device fault of this code, told with this one; 0: ignore it."""
        return dict(self.codes).get(code, level)

    def action_of(self, level: int) -> LevelAction:
        """What a device fault of this level (1 to 6) asks for. Raises ValueError."""
        if not 1 <= level <= len(self.levels):
            raise ValueError(f"level {level} is out of range: 1 to {len(self.levels)}")
        return self.levels[level - 1]
