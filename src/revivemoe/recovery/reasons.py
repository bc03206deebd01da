"""The sentence of a plan, for the person on call."""

from revivemoe.ids import RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import ExpertOfLayer, Reload
from revivemoe.recovery.role_switch import RoleSwitch
from revivemoe.recovery.world import World


def who(lost: frozenset[RankId]) -> str:
    if not lost:
        return "no rank"
    return f"rank{'s' if len(lost) > 1 else ''} {', '.join(str(r) for r in sorted(lost))}"


def reason(
    world: World,
    lost: frozenset[RankId],
    present: Membership,
    masked: tuple[ExpertOfLayer, ...],
    reloads: tuple[Reload, ...],
    background: tuple[Reload, ...],
) -> str:
    """One sentence for the person on call."""
    parts = []
    elsewhere = [x for x in reloads if x.rank in world.membership.placement.slots]
    if elsewhere:
        ranks = len({x.rank for x in elsewhere})
        parts.append(f"{len(elsewhere)} experts are loaded into free slots of {ranks} ranks")
    if masked:
        layers = len({layer for layer, _ in masked})
        meanwhile = ", while they are loaded into spare slots" if background else ""
        parts.append(
            f"{len(masked)} experts over {layers} layers of {present.placement.num_experts} have "
            f"no replica: mask them{meanwhile}, which the policy allows, and go on degraded"
        )
    if world.ready:
        parts.append(f"ranks {', '.join(map(str, world.ready))} are taken in")
    if world.loaded:
        parts.append(f"{len(world.loaded)} experts loaded meanwhile are taken into use")
    if lost:
        if not masked and not reloads and any(r in world.membership.placement.slots for r in lost):
            parts.append("every lost expert has a replica: drop the lost ones and go on")
        elif not parts and not reloads:
            parts.append("no expert is lost with it: its sequences move and the others go on")
        return "; ".join((f"{who(lost)} lost", *parts))
    return "; ".join(parts) or (
        "no rank is accused: the same members get a new domain and redo the step"
    )


def about_dense(world: World, present: Membership) -> str:
    """What the loss means for groups that share the dense layers."""
    if world.membership.dense is None:
        return ""
    groups = world.membership.dense
    before = groups.healthy(world.membership.attention)
    after = groups.healthy(present.attention)
    broken = len(set(before) - set(after))
    if not broken:
        return ""
    said = f"; {broken} dense-FFN group{'s have' if broken > 1 else ' has'} lost a shard"
    if after:
        return f"{said}: the others take its tokens"
    return f"{said} and none is left: the shards are loaded over the attention ranks"


def of_switches(switches: tuple[RoleSwitch, ...], num_loads: int, aside: bool) -> str:
    """Who becomes an expert rank, and when."""
    ranks = " and ".join(
        f"rank {s.rank} becomes an expert rank"
        + (f" in the place of rank {s.replaces}" if s.replaces is not None else "")
        for s in switches
    )
    how = "beside the others, which go on meanwhile" if aside else "before the next step"
    return f"{ranks} and loads {num_loads} experts {how}"
