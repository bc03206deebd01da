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

    def __post_init__(self) -> None:
        present, placement = self.membership, self.membership.placement
        assert present.attention, "a plan without an attention rank"
        assert present.experts, "a plan without an expert rank"
        assert set(self.masked) <= set(present.missing), "an expert is masked and there"
        targets = {move.to for move in self.migrations}
        assert targets <= set(present.attention), f"sequences move to {sorted(targets)}"
        for load in self.reloads:
            held = placement.holders(load.layer, load.expert)
            assert (load.rank, load.slot) in held, f"the map does not name {load}"
        loading = {load.rank for load in self.background}
        assert loading <= set(present.experts), f"ranks {sorted(loading)} have no slots"
        for switch in self.switches:
            assert (switch.rank in present.experts) != self.switch_aside, f"the role of {switch}"


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
