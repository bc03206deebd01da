"""`plan_recovery`: from the world and the faults to what shall be done, and one sentence why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.dense_groups import DenseGroups
from revivemoe.membership.placement import (
    ExpertPlacement,
    missing_fraction,
)
from revivemoe.membership.topology import (
    Topology,
    joined,
    switched,
    without,
)
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repair import Reload, assign_reloads, with_cleared, with_reloads
from revivemoe.recovery.role_switch import RoleSwitch, asked_switch, choose_switches

DOMAIN_FAILURES = 3
"""So many domains in a row that did not come about: restart all ranks."""


@dataclass(frozen=True)
class SequenceView:
    """One unfinished sequence, as its owner's host knows it."""

    seq_id: SeqId
    owner: RankId | None
    """None while no rank has it: it waits for its first one, or has lost its last one."""
    num_tokens: int
    """Prompt and committed output: what a migration would compute again."""
    arrival: int
    orphan: bool = False
    """It has lost its rank."""
    held: bool = False
    """It may not run now: another suspect is being tried alone."""


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
    recent_restarts: int = 0
    """Restarts of ranks within the window."""
    home: Topology | None = None
    """The topology the instance was started with: roles and order of ranks that come back."""
    gone: tuple[RankId, ...] = ()
    """Members whose process of this epoch is gone, accused or not."""
    ready: tuple[RankId, ...] = ()
    """Ranks whose new process waits to be taken in."""
    tables: dict[RankId, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """What the slots of those hold, as `ExpertPlacement.slots`."""
    launching: tuple[RankId, ...] = ()
    """Ranks whose new process is still loading."""
    relaunchable: tuple[RankId, ...] = ()
    """Ranks without a process, for which one may be started."""
    loaded: tuple[Reload, ...] = ()
    """Experts that lie in slots the map does not name yet."""
    loading: tuple[Reload, ...] = ()
    """Experts that are being loaded beside the steps."""
    domain_failures: int = 0
    """Domains in a row that did not come about."""
    trials: frozenset[RankId] = frozenset()
    """Ranks on which a suspect is tried: nothing new goes there."""
    can_load: bool = True
    """False while loading experts has just failed."""
    home_placement: ExpertPlacement | None = None
    """The experts' map that the instance was started with."""
    switched: Mapping[RankId, RankId | None] = field(default_factory=dict)
    """Ranks that have become expert ranks, or are about to, and whose place they take; `home` has
    them as such."""
    dense: DenseGroups | None = None
    """Groups that share the dense layers."""
    switch: RankId | None = None
    """An attention rank that somebody wants to become an expert rank."""


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
    reloads: tuple[Reload, ...] = ()
    """Loaded before the first step; `placement` names them already."""
    background: tuple[Reload, ...] = ()
    """To be loaded beside the steps; masked in `placement` until then."""
    taken: tuple[Reload, ...] = ()
    """Experts loaded meanwhile that were looked at: in use now, or not needed any more."""
    dense: DenseGroups | None = None
    """Groups that share the dense layers from now on."""
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


def plan_recovery(world: World, faults: Sequence[Fault], policy: Policy) -> RecoveryPlan:
    """Decide what becomes of the instance without the accused ranks. Pure: the same input, the
    same plan. Paper section 3: migrate, drop replicas, repair the expert set, go on.
    """
    accused = frozenset(f.rank for f in faults)
    lost = (accused | frozenset(world.gone)) & frozenset(world.topology.members)
    if world.recent_recoveries >= policy.max_recoveries:
        return GiveUp(
            f"{world.recent_recoveries} recoveries within {policy.window_s:.0f} s have reached the "
            f"policy's limit of {policy.max_recoveries}"
        )
    if world.domain_failures >= DOMAIN_FAILURES:
        why = f"{world.domain_failures} domains in a row did not come about"
        everybody = tuple(r for r in world.topology.members if r not in lost)
        return _restart(world, (*everybody, *world.relaunchable), policy, why)
    present = _present(world, lost, accused)
    refusal = _no_roles(present.topology, lost)
    if refusal is not None:
        switch = _role_switch(world, present, lost, policy)
        if isinstance(switch, Continue) and "role_switch" in policy.repair:
            return switch
        return _restart(world, world.relaunchable, policy, refusal)
    if world.switch is not None and world.switch not in lost:
        return _asked_switch(world, present, lost, policy)
    return _repair(world, present, lost, policy)


@dataclass(frozen=True)
class _Present:
    """Who and what is there."""

    topology: Topology
    placement: ExpertPlacement


def _present(world: World, lost: frozenset[RankId], accused: frozenset[RankId]) -> _Present:
    topology = without(world.topology, lost, Epoch(world.topology.epoch + 1))
    placement = world.placement.without(lost)
    back = tuple(r for r in world.ready if r not in accused)
    if back:
        assert world.home is not None, "ranks come back to a world without a home"
        topology = joined(topology, back, world.home)
        for rank in back:
            if world.tables.get(rank):
                placement = placement.with_rank(rank, world.tables[rank])
    here = [load for load in world.loaded if load.rank in placement.slots]
    return _Present(topology, with_reloads(placement, here))


def _no_roles(topology: Topology, lost: frozenset[RankId]) -> str | None:
    for role, ranks in (("attention", topology.attention), ("expert", topology.experts)):
        if not ranks:
            return f"no {role} rank is left ({_who(lost)} lost)"
    return None


def _restart(world: World, ranks: tuple[RankId, ...], policy: Policy, why: str) -> Restart | GiveUp:
    """Start what can be started, if the policy allows it."""
    ranks = tuple(sorted(set(ranks) - set(world.launching)))
    if not ranks and world.launching:
        waiting = ", ".join(map(str, world.launching))
        return Restart((), f"{why}: waiting for ranks {waiting}, which are being started")
    if "restart" not in policy.repair:
        return GiveUp(f"{why}, and the policy does not allow a restart")
    if not ranks:
        return GiveUp(f"{why}, and no rank can be started anew")
    if world.recent_restarts >= policy.max_restarts:
        return GiveUp(
            f"{why}, and {world.recent_restarts} restarts within {policy.window_s:.0f} s have "
            f"reached the policy's limit of {policy.max_restarts}"
        )
    started = ", ".join(map(str, ranks))
    return Restart(ranks, f"{why}: start ranks {started} anew, the streams wait")


def _repair(
    world: World, present: _Present, lost: frozenset[RankId], policy: Policy
) -> RecoveryPlan:
    """The first repair of the policy's order that is possible."""
    missing = set(present.placement.missing())
    if not missing:
        return _continue(world, present, lost)
    refused = []
    for repair in policy.repair:
        if repair == "restart":
            continue
        attempt = _ATTEMPTS[repair]
        plan = attempt(world, present, lost, policy)
        if isinstance(plan, Continue):
            return plan
        refused.append(plan)
    if missing <= set(world.placement.missing()):  # no worse than it was
        return _continue(world, present, lost)
    why = f"{_who(lost)} lost: {'; '.join(refused)}"
    return _restart(world, world.relaunchable, policy, why)


def _mask(
    world: World, present: _Present, lost: frozenset[RankId], policy: Policy
) -> Continue | str:
    """Go on without the missing experts, or why not."""
    return _refuse_masking(world, present.placement, policy) or _continue(world, present, lost)


def _reload(
    world: World, present: _Present, lost: frozenset[RankId], policy: Policy
) -> Continue | str:
    """Load missing experts into spare slots, or why not."""
    placement = present.placement
    under_way = {(x.layer, x.expert) for x in world.loading if x.rank in placement.slots}
    missing = [pair for pair in placement.missing() if pair not in under_way]
    if not world.can_load:
        return "experts could not be loaded a moment ago"
    reserved = {(x.rank, x.layer, x.slot) for x in world.loading}
    reloads = assign_reloads(_without_slots(placement, reserved), missing)
    if not reloads:
        return f"{len(missing)} experts have no replica left and there is no spare slot for them"
    cleared = replace(present, placement=with_cleared(placement, reloads))
    if policy.serve_masked_meanwhile and not _refuse_masking(world, cleared.placement, policy):
        return _continue(world, cleared, lost, background=reloads)
    full = replace(present, placement=with_reloads(placement, reloads))
    if full.placement.missing():
        room = f"spare slots for {len(reloads)} of {len(missing)} experts without a replica"
        if "mask" not in policy.repair:
            return room
        if refusal := _refuse_masking(world, full.placement, policy):
            return f"{room}; {refusal}"
    return _continue(world, full, lost, reloads=reloads)


def _role_switch(
    world: World, present: _Present, lost: frozenset[RankId], policy: Policy
) -> Continue | str:
    """Let attention ranks become expert ranks for the missing experts, or why not."""
    topology, placement = present.topology, present.placement
    promised = _promised(world, placement)
    wanted = [pair for pair in placement.missing() if pair not in promised]
    if not world.can_load:
        return "experts could not be loaded a moment ago"
    if not wanted:
        return f"{len(placement.missing())} experts are being loaded already"
    if not topology.attention:
        return "no attention rank is left"
    tokens = dict.fromkeys(topology.attention, 0)
    for view in world.sequences:
        if view.owner in tokens:
            tokens[view.owner] += view.num_tokens
    switches = choose_switches(
        topology,
        placement,
        wanted,
        world.placement.slots_per_rank,
        tokens,
        _places(world, topology),
    )
    if isinstance(switches, str):
        return switches
    return _switch(world, present, lost, policy, switches)


def _asked_switch(
    world: World, present: _Present, lost: frozenset[RankId], policy: Policy
) -> RecoveryPlan:
    assert world.switch is not None
    topology = present.topology
    switch = asked_switch(
        topology,
        present.placement,
        world.home_placement or present.placement,
        world.placement.slots_per_rank,
        world.switch,
        _places(world, topology),
    )
    if isinstance(switch, str):  # meanwhile it makes no sense any more
        return _repair(world, present, lost, policy)
    plan = _switch(world, present, lost, policy, (switch,))
    return plan if isinstance(plan, Continue) else _repair(world, present, lost, policy)


def _switch(
    world: World,
    present: _Present,
    lost: frozenset[RankId],
    policy: Policy,
    switches: tuple[RoleSwitch, ...],
) -> Continue | str:
    """Go on with these switches, or why not."""
    topology, placement = present.topology, present.placement
    leaving = frozenset(s.rank for s in switches)
    wanted_aside = world.switch is not None or policy.serve_masked_meanwhile
    refusal = _refuse_masking(world, placement, policy)
    aside = bool(topology.experts) and wanted_aside and refusal is None
    if aside:
        outside = replace(present, topology=without(topology, leaving, topology.epoch))
        plan = _continue(world, outside, lost, leaving=leaving)
    else:
        home = world.home or world.topology
        for switch in switches:
            home = switched(home, switch.rank, switch.replaces)
            placement = placement.with_rank(switch.rank, switch.table)
        if refusal := _refuse_masking(world, placement, policy):
            return refusal
        stay = without(topology, leaving, topology.epoch)
        topology = joined(stay, tuple(s.rank for s in switches), home)
        loads = tuple(load for s in switches for load in s.loads(placement.layers))
        plan = _continue(world, _Present(topology, placement), lost, reloads=loads)
    who = " and ".join(
        f"rank {s.rank} becomes an expert rank"
        + (f" in the place of rank {s.replaces}" if s.replaces is not None else "")
        for s in switches
    )
    how = "beside the others, which go on meanwhile" if aside else "before the next step"
    count = sum(len(s.loads(placement.layers)) for s in switches)
    return replace(
        plan,
        switches=switches,
        switch_aside=aside,
        role_switched=switches[0].rank,
        reason=f"{plan.reason}; {who} and loads {count} experts {how}",
    )


def _places(world: World, topology: Topology) -> list[RankId]:
    """Expert ranks of the start that are not there, whose places can be taken."""
    home = world.home or world.topology
    there = {*topology.members, *world.launching, *world.ready}
    taken = {replaced for rank, replaced in world.switched.items() if rank in there}
    return [rank for rank in home.experts if rank not in {*there, *taken, *world.switched}]


def _promised(world: World, placement: ExpertPlacement) -> set[tuple[LayerId, ExpertId]]:
    """Experts that ranks are loading: into spare slots, or for the role they are to have."""
    switching = [r for r in world.launching if r in world.switched and r in world.tables]
    promised = {
        (layer, ExpertId(expert))
        for rank in switching
        for layer, row in zip(world.placement.layers, world.tables[rank], strict=True)
        for expert in row
        if expert >= 0
    }
    return promised | {(x.layer, x.expert) for x in world.loading if x.rank in placement.slots}


def _without_slots(
    placement: ExpertPlacement, reserved: set[tuple[RankId, LayerId, SlotId]]
) -> ExpertPlacement:
    """The map without slots that are being loaded into (they look occupied by a sole expert)."""
    if not reserved:
        return placement
    occupied = placement.num_experts  # no real expert: a sole one, and so never spare
    for rank, layer, slot in reserved:
        if rank in placement.slots:
            placement = placement.with_slot(rank, layer, slot, occupied)
            occupied += 1
    return placement


def _refuse_masking(world: World, placement: ExpertPlacement, policy: Policy) -> str | None:
    fraction = missing_fraction(placement)
    if not fraction or set(placement.missing()) <= set(world.placement.missing()):
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


_ATTEMPTS = {"reload": _reload, "role_switch": _role_switch, "mask": _mask}


def _continue(
    world: World,
    present: _Present,
    lost: frozenset[RankId],
    reloads: tuple[Reload, ...] = (),
    background: tuple[Reload, ...] = (),
    leaving: frozenset[RankId] = frozenset(),
) -> Continue:
    """`leaving`: ranks that are not lost, but go out for a while."""
    placement = present.placement
    masked = tuple(sorted(set(placement.missing()) - set(world.placement.missing())))
    dropped = lost - frozenset(present.topology.members) - leaving
    held = sum(e >= 0 for r in dropped for row in world.placement.slots.get(r, ()) for e in row)
    missed = set(world.placement.missing())
    gone = len(masked) + len({(x.layer, x.expert) for x in reloads} - missed)
    back = [r for r in world.ready if r in world.switched and r in present.topology.members]
    return Continue(
        role_switched=next(iter(back), None),
        topology=present.topology,
        placement=placement,
        migrations=tuple(_migrate(world, present.topology)),
        experts_dropped=max(0, held - gone),
        masked=masked,
        reason=_reason(world, dropped, placement, masked, reloads, background)
        + _about_dense(world, present.topology),
        reloads=reloads,
        background=background,
        taken=world.loaded,
        dense=_dense(world, present.topology, lost | leaving),
    )


def _dense(world: World, topology: Topology, gone: frozenset[RankId]) -> DenseGroups | None:
    if world.dense is None:
        return None
    changed = gone | frozenset(world.topology.attention) - frozenset(topology.attention)
    return world.dense.after(topology.attention, changed)


def _migrate(world: World, topology: Topology) -> list[Migration]:
    """Sequences without a living owner go, oldest first, to the rank with the fewest tokens."""
    load = dict.fromkeys(topology.attention, 0)
    homeless = []
    for view in world.sequences:
        if view.owner is not None and view.owner in load:
            load[view.owner] += view.num_tokens
        elif (view.orphan or view.owner is not None) and not view.held:
            homeless.append(view)
    load = {rank: tokens for rank, tokens in load.items() if rank not in world.trials} or load
    migrations = []
    for view in sorted(homeless, key=lambda v: (v.arrival, v.seq_id)):
        target = min(load, key=lambda rank: (load[rank], rank))
        load[target] += view.num_tokens
        migrations.append(Migration(view.seq_id, target, view.num_tokens))
    return migrations


def refuse_switch(world: World, rank: RankId) -> str | None:
    """Why this rank cannot, or need not, become an expert rank now; None: it can."""
    topology = world.topology
    switch = asked_switch(
        topology,
        world.placement,
        world.home_placement or world.placement,
        world.placement.slots_per_rank,
        rank,
        _places(world, topology),
    )
    return switch if isinstance(switch, str) else None


def _who(lost: frozenset[RankId]) -> str:
    if not lost:
        return "no rank"
    return f"rank{'s' if len(lost) > 1 else ''} {', '.join(str(r) for r in sorted(lost))}"


def _reason(
    world: World,
    lost: frozenset[RankId],
    placement: ExpertPlacement,
    masked: tuple[tuple[LayerId, ExpertId], ...],
    reloads: tuple[Reload, ...],
    background: tuple[Reload, ...],
) -> str:
    """One sentence for the person on call."""
    parts = []
    elsewhere = [x for x in reloads if x.rank in world.placement.slots]
    if elsewhere:
        ranks = len({x.rank for x in elsewhere})
        parts.append(f"{len(elsewhere)} experts are loaded into free slots of {ranks} ranks")
    if masked:
        layers = len({layer for layer, _ in masked})
        meanwhile = ", while they are loaded into spare slots" if background else ""
        parts.append(
            f"{len(masked)} experts over {layers} layers of {placement.num_experts} have no "
            f"replica: mask them{meanwhile}, which the policy allows, and go on degraded"
        )
    if world.ready:
        parts.append(f"ranks {', '.join(map(str, world.ready))} are taken in")
    if world.loaded:
        parts.append(f"{len(world.loaded)} experts loaded meanwhile are taken into use")
    if lost:
        if not masked and not reloads and any(r in world.placement.slots for r in lost):
            parts.append("every lost expert has a replica: drop the lost ones and go on")
        elif not parts and not reloads:
            parts.append("no expert is lost with it: its sequences move and the others go on")
        return "; ".join((f"{_who(lost)} lost", *parts))
    return "; ".join(parts) or (
        "no rank is accused: the same members get a new domain and redo the step"
    )


def _about_dense(world: World, topology: Topology) -> str:
    """What the loss means for groups that share the dense layers."""
    if world.dense is None:
        return ""
    before = world.dense.healthy(world.topology.attention)
    after = world.dense.healthy(topology.attention)
    broken = len(set(before) - set(after))
    if not broken:
        return ""
    groups = f"; {broken} dense-FFN group{'s have' if broken > 1 else ' has'} lost a shard"
    if after:
        return f"{groups}: the others take its tokens"
    return f"{groups} and none is left: the shards are loaded over the attention ranks"


def describe_plan(plan: RecoveryPlan) -> dict[str, Any]:
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
                "members": list(plan.topology.members),
                "migrations": [{"seq_id": m.seq_id, "to": m.to} for m in plan.migrations],
                "recomputed_tokens": sum(m.num_tokens for m in plan.migrations),
                "experts_dropped": plan.experts_dropped,
                "experts_reloaded": len(plan.reloads) + len(plan.background),
                "experts_masked": [list(pair) for pair in plan.masked],
                "role_switched": plan.role_switched,
            }
