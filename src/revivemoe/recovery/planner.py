"""`plan_recovery`: from the world and the faults to what shall be done, and one sentence why."""

from collections.abc import Sequence
from dataclasses import dataclass

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SeqId
from revivemoe.placement import ExpertPlacement, missing_fraction
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.topology import Topology, without


@dataclass(frozen=True)
class SequenceView:
    """One unfinished sequence, as its owner's host knows it."""

    seq_id: SeqId
    owner: RankId | None
    """None while it waits for its first rank: not a migration, the router's affair."""
    num_tokens: int
    """Prompt and committed output: what a migration would compute again."""
    arrival: int


@dataclass(frozen=True)
class World:
    """Everything the plan depends on."""

    topology: Topology
    placement: ExpertPlacement
    sequences: tuple[SequenceView, ...]
    maskable: bool
    """Whether the model's routers can leave experts out."""
    recent_recoveries: int
    """Recoveries within the policy's window, this one not counted."""


@dataclass(frozen=True)
class Migration:
    seq_id: SeqId
    to: RankId
    num_tokens: int


@dataclass(frozen=True)
class Continue:
    """Go on in a new epoch."""

    topology: Topology
    placement: ExpertPlacement
    migrations: tuple[Migration, ...]
    """Oldest first."""
    experts_dropped: int
    """Lost replicas of experts that live on elsewhere, summed over layers."""
    masked: tuple[tuple[LayerId, ExpertId], ...]
    """Experts that become missing with this plan."""
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Recovery does not cover this."""

    reason: str


RecoveryPlan = Continue | GiveUp


def plan_recovery(world: World, faults: Sequence[Fault], policy: Policy) -> RecoveryPlan:
    """Decide what becomes of the instance without the accused ranks. Pure: the same input, the
    same plan. Paper section 3: migrate, drop replicas, mask what is left within the bound.
    """
    lost = frozenset(f.rank for f in faults) & frozenset(world.topology.members)
    if world.recent_recoveries >= policy.max_recoveries:
        return GiveUp(
            f"{world.recent_recoveries} recoveries within {policy.window_s:.0f} s have reached the "
            f"policy's limit of {policy.max_recoveries}"
        )
    topology = without(world.topology, lost, Epoch(world.topology.epoch + 1))
    if not topology.attention:
        return GiveUp(f"no attention rank is left ({_who(lost)} lost)")
    if not topology.experts:
        return GiveUp(f"no expert rank is left ({_who(lost)} lost)")
    placement = world.placement.without(lost)
    refusal = _refuse_masking(world, placement, policy)
    if refusal is not None:
        return GiveUp(f"{_who(lost)} lost: {refusal}")
    masked = tuple(sorted(set(placement.missing()) - set(world.placement.missing())))
    held = sum(e >= 0 for r in lost for row in world.placement.slots.get(r, ()) for e in row)
    return Continue(
        topology=topology,
        placement=placement,
        migrations=tuple(_migrate(world, topology)),
        experts_dropped=held - len(masked),
        masked=masked,
        reason=_reason(lost, masked, world.placement.num_experts),
    )


def _refuse_masking(world: World, placement: ExpertPlacement, policy: Policy) -> str | None:
    fraction = missing_fraction(placement)
    if not fraction or fraction == missing_fraction(world.placement):
        return None
    count = len(placement.missing())
    if not world.maskable:
        return f"{count} experts have no replica left and this model's router cannot be masked"
    if fraction > policy.max_missing_fraction:
        return (
            f"{fraction:.1%} of a layer's experts would be missing, more than "
            f"--max-missing-fraction {policy.max_missing_fraction:.1%} allows "
            "(--redundant-experts would have covered them)"
        )
    return None


def _migrate(world: World, topology: Topology) -> list[Migration]:
    """Sequences without a living owner go, oldest first, to the survivor with the fewest tokens."""
    load = dict.fromkeys(topology.attention, 0)
    homeless = []
    for view in world.sequences:
        if view.owner in load:
            load[view.owner] += view.num_tokens
        elif view.owner is not None:
            homeless.append(view)
    migrations = []
    for view in sorted(homeless, key=lambda v: (v.arrival, v.seq_id)):
        target = min(load, key=lambda rank: (load[rank], rank))
        load[target] += view.num_tokens
        migrations.append(Migration(view.seq_id, target, view.num_tokens))
    return migrations


def _who(lost: frozenset[RankId]) -> str:
    if not lost:
        return "no rank"
    return f"rank{'s' if len(lost) > 1 else ''} {', '.join(str(r) for r in sorted(lost))}"


def _reason(
    lost: frozenset[RankId], masked: tuple[tuple[LayerId, ExpertId], ...], num_experts: int
) -> str:
    if not lost:
        return "communication failed and no rank is accused: the same members get a new domain"
    if not masked:
        return f"{_who(lost)} lost; every lost expert has a replica: drop the lost ones and go on"
    layers = len({layer for layer, _ in masked})
    return (
        f"{_who(lost)} lost; {len(masked)} experts over {layers} layers of {num_experts} have no "
        "replica: mask them, which the policy allows, and go on degraded"
    )
