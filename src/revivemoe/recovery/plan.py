"""What shall be done: one of three decisions, each with the sentence that says why."""

from dataclasses import dataclass

from revivemoe.ids import ExpertId, LayerId, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Reload
from revivemoe.recovery.role_switch import RoleSwitch


@dataclass(frozen=True)
class Migration:
    seq_id: SeqId
    to: RankId
    num_tokens: int


@dataclass(frozen=True)
class Continue:
    """Go on in a new epoch."""

    membership: Membership
    """Of the epoch to come."""
    migrations: tuple[Migration, ...]
    """Oldest first."""
    experts_dropped: int
    """Lost replicas of experts that live on elsewhere, summed over layers."""
    masked: tuple[tuple[LayerId, ExpertId], ...]
    """Experts that become missing with this plan."""
    reason: str
    reloads: tuple[Reload, ...] = ()
    """Loaded before the first step; the map names them already."""
    background: tuple[Reload, ...] = ()
    """To be loaded beside the steps; masked until then."""
    taken: tuple[Reload, ...] = ()
    """Experts loaded meanwhile that were looked at: in use now, or not needed any more."""
    switches: tuple[RoleSwitch, ...] = ()
    """Attention ranks that become expert ranks."""
    switch_aside: bool = False
    """They do so outside of the epoch, and come back once they have loaded; otherwise they are
    members, and load before the first step."""
    role_switched: RankId | None = None
    """A rank whose role changes, or has changed, with this plan."""


@dataclass(frozen=True)
class Restart:
    """Start ranks anew behind the live streams, and plan again when they are ready."""

    ranks: tuple[RankId, ...]
    """To be started now; none if those that are being started will do."""
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Recovery does not cover this."""

    reason: str


RecoveryPlan = Continue | Restart | GiveUp


def describe_plan(plan: RecoveryPlan) -> dict[str, object]:
    """A plan as a JSON document."""
    match plan:
        case GiveUp():
            return {"outcome": "failed", "reason": plan.reason}
        case Restart():
            return {"outcome": "restarted", "reason": plan.reason, "restart": list(plan.ranks)}
        case _:
            return {
                "outcome": "recovered",
                "reason": plan.reason,
                "members": list(plan.membership.members),
                "migrations": [{"seq_id": m.seq_id, "to": m.to} for m in plan.migrations],
                "recomputed_tokens": sum(m.num_tokens for m in plan.migrations),
                "experts_dropped": plan.experts_dropped,
                "experts_reloaded": len(plan.reloads) + len(plan.background),
                "experts_masked": [list(pair) for pair in plan.masked],
                "role_switched": plan.role_switched,
            }
