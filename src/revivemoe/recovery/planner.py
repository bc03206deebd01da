"""`plan_recovery`: from the world and the faults to what shall be done, and one sentence why."""

from collections.abc import Sequence
from dataclasses import replace

from revivemoe.ids import Epoch, ExpertId, RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import EMPTY, ExpertOfLayer, Reload, Table
from revivemoe.membership.topology import switched
from revivemoe.recovery import reasons
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue, GiveUp, Migration, RecoveryPlan, Restart
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.repair import assign_reloads
from revivemoe.recovery.role_switch import RoleSwitch, asked_switch, choose_switches
from revivemoe.recovery.world import World

DOMAIN_FAILURES = 3
"""So many domains in a row that did not come about: restart all ranks."""
Lost = frozenset[RankId]


def plan_recovery(world: World, faults: Sequence[Fault], policy: Policy) -> RecoveryPlan:
    """Decide what becomes of the instance without the accused ranks. Pure: the same input, the
    same plan. Paper section 3: migrate, drop replicas, repair the expert set, go on.
    """
    accused = frozenset(f.rank for f in faults)
    lost = (accused | frozenset(world.gone)) & frozenset(world.membership.members)
    if why := _in_vain(world, policy):
        everybody = tuple(r for r in world.membership.members if r not in lost)
        return _restart(world, (*everybody, *world.relaunchable), policy, why)
    present = _present(world, lost, accused)
    if refusal := _no_roles(present, lost):
        switch = _role_switch(world, present, lost, policy)
        if isinstance(switch, Continue) and "role_switch" in policy.repair:
            return switch
        return _restart(world, world.relaunchable, policy, refusal)
    if world.switch is not None and world.switch not in lost:
        return _asked_switch(world, present, lost, policy)
    return _repair(world, present, lost, policy)


def _in_vain(world: World, policy: Policy) -> str | None:
    """Why nothing short of a restart is tried any more; None: there is no reason."""
    if world.recent_recoveries >= policy.max_recoveries:
        return (
            f"{world.recent_recoveries} recoveries in a row brought no step forward (the policy's "
            f"limit is {policy.max_recoveries} within {policy.window_s:.0f} s)"
        )
    if world.domain_failures >= DOMAIN_FAILURES:
        return f"{world.domain_failures} domains in a row did not come about"
    return None


def _present(world: World, lost: Lost, accused: Lost) -> Membership:
    """Who and what is there, before anything is repaired."""
    present = world.membership.without(lost).holding(world.held)
    back = tuple(r for r in world.ready if r not in accused)
    if back:
        assert world.home is not None
        present = present.joined(back, world.home, {r: _table(world, r) for r in back})
    return present.with_reloads(x for x in world.loaded if x.rank in present.placement.slots)


def _table(world: World, rank: RankId) -> Table:
    """What the slots of a rank that is taken in hold. One that was told of its role, and has
    acknowledged a fence without slots, has not got to it yet: they will be empty.
    """
    table = world.tables.get(rank, ())
    told = world.held.get(rank, table)
    return told or tuple((EMPTY,) * len(row) for row in table)


def _no_roles(present: Membership, lost: Lost) -> str | None:
    for role, ranks in (("attention", present.attention), ("expert", present.experts)):
        if not ranks:
            return f"no {role} rank is left ({reasons.who(lost)} lost)"
    return None


def _restart(world: World, ranks: tuple[RankId, ...], policy: Policy, why: str) -> Restart | GiveUp:
    """Start what can be started, if the policy allows it. The last resort waits until nobody else
    is left who could help: who is on the way may, and a plan is made when he comes or does not.
    """
    ranks = tuple(sorted(set(ranks) - set(world.launching)))
    if not ranks and world.launching:
        waiting = ", ".join(map(str, world.launching))
        return Restart((), f"{why}: waiting for ranks {waiting}, which are being started")
    ranks = ranks or tuple(sorted(world.last_resort))
    if "restart" not in policy.repair:
        return GiveUp(f"{why}, and the policy does not allow a restart")
    if not ranks:
        return GiveUp(f"{why}, and no rank can be started anew")
    if world.recent_restarts >= policy.max_restarts:
        return GiveUp(
            f"{why}, and {world.recent_restarts} restarts in a row within {policy.window_s:.0f} s "
            f"brought no step forward: the policy's limit is {policy.max_restarts}"
        )
    started = ", ".join(map(str, ranks))
    return Restart(ranks, f"{why}: start ranks {started} anew, the streams wait")


# ---- repairs of the expert set, each of which may say why it cannot be ------------------------


def _repair(world: World, present: Membership, lost: Lost, policy: Policy) -> RecoveryPlan:
    """The first repair of the policy's order that is possible."""
    if not present.missing:
        return _continue(world, present, lost)
    refused = []
    for repair in policy.repair:
        if repair == "restart":
            continue
        plan = _ATTEMPTS[repair](world, present, lost, policy)
        if isinstance(plan, Continue):
            return plan
        refused.append(plan)
    if set(present.missing) <= set(world.membership.missing):  # no worse than it was
        return _continue(world, present, lost)
    why = f"{reasons.who(lost)} lost: {'; '.join(refused)}"
    return _restart(world, world.relaunchable, policy, why)


def _mask(world: World, present: Membership, lost: Lost, policy: Policy) -> Continue | str:
    """Go on without the missing experts."""
    return _refuse_masking(world, present, policy) or _continue(world, present, lost)


def _reload(world: World, present: Membership, lost: Lost, policy: Policy) -> Continue | str:
    """Load missing experts into spare slots."""
    under_way = _being_loaded(world, present)
    missing = [pair for pair in present.missing if pair not in under_way]
    if not world.can_load:
        return "experts could not be loaded a moment ago"
    reserved = {(x.rank, x.layer, x.slot) for x in world.loading}
    reloads = assign_reloads(present.placement, missing, reserved, world.refusing)
    if not reloads:
        return f"{len(missing)} experts have no replica left and there is no spare slot for them"
    cleared = present.cleared(reloads)
    if policy.serve_masked_meanwhile and not _refuse_masking(world, cleared, policy):
        return _continue(world, cleared, lost, background=reloads)
    full = present.with_reloads(reloads)
    if full.missing:
        room = f"spare slots for {len(reloads)} of {len(missing)} experts without a replica"
        if "mask" not in policy.repair:
            return room
        if refusal := _refuse_masking(world, full, policy):
            return f"{room}; {refusal}"
    return _continue(world, full, lost, reloads=reloads)


def _role_switch(world: World, present: Membership, lost: Lost, policy: Policy) -> Continue | str:
    """Let attention ranks become expert ranks for the missing experts."""
    promised = _being_loaded(world, present) | _being_switched(world)
    wanted = [pair for pair in present.missing if pair not in promised]
    if not world.can_load:
        return "experts could not be loaded a moment ago"
    if not wanted:
        return f"{len(present.missing)} experts are being loaded already"
    if world.awaited:
        who = ", ".join(map(str, sorted(world.awaited)))
        return f"ranks {who} are being started for this, with experts"
    if not present.attention:
        return "no attention rank is left"
    tokens = dict.fromkeys(present.attention, 0)
    for view in world.sequences:
        if view.owner in tokens:
            tokens[view.owner] += view.num_tokens
    width, places = world.membership.placement.slots_per_rank, _places(world, present)
    switches = choose_switches(
        present.topology, present.placement, wanted, width, tokens, places
    )  # fmt: skip
    if isinstance(switches, str):
        return switches
    return _switch(world, present, lost, policy, switches)


_ATTEMPTS = {"reload": _reload, "role_switch": _role_switch, "mask": _mask}


def refuse_switch(world: World, rank: RankId) -> str | None:
    """Why this rank cannot, or need not, become an expert rank now; None: it can."""
    switch = _switch_of(world, world.membership, rank)
    return switch if isinstance(switch, str) else None


def _switch_of(world: World, present: Membership, rank: RankId) -> RoleSwitch | str:
    home = world.home_placement or present.placement
    width, places = world.membership.placement.slots_per_rank, _places(world, present)
    return asked_switch(present.topology, present.placement, home, width, rank, places)


def _asked_switch(world: World, present: Membership, lost: Lost, policy: Policy) -> RecoveryPlan:
    assert world.switch is not None
    switch = _switch_of(world, present, world.switch)
    if isinstance(switch, str):  # meanwhile it makes no sense any more
        return _repair(world, present, lost, policy)
    plan = _switch(world, present, lost, policy, (switch,))
    return plan if isinstance(plan, Continue) else _repair(world, present, lost, policy)


def _switch(
    world: World, present: Membership, lost: Lost, policy: Policy, switches: tuple[RoleSwitch, ...]
) -> Continue | str:
    """Go on with these switches: beside the others if what is missing meanwhile may be."""
    leaving = frozenset(s.rank for s in switches)
    loads = tuple(load for s in switches for load in s.loads(present.placement.layers))
    without = present.without(leaving)
    wanted_aside = world.switch is not None or policy.serve_masked_meanwhile
    aside = wanted_aside and bool(present.experts) and not _refuse_masking(world, present, policy)
    if aside:
        plan = _continue(world, without, lost - leaving)
    else:
        home = world.home or world.membership.topology
        for switch in switches:
            home = switched(home, switch.rank, switch.replaces)
        full = without.joined(leaving, home, {s.rank: s.table for s in switches})
        if refusal := _refuse_masking(world, full, policy):
            return refusal
        plan = _continue(world, full, lost, reloads=loads)
    return replace(
        plan,
        switches=switches,
        switch_aside=aside,
        role_switched=switches[0].rank,
        reason=f"{plan.reason}; {reasons.of_switches(switches, len(loads), aside)}",
    )


def _places(world: World, present: Membership) -> list[RankId]:
    """Expert ranks of the start that are not there, whose places can be taken."""
    home = world.home or world.membership.topology
    there = {*present.members, *world.launching, *world.ready}
    taken = {replaced for rank, replaced in world.switched.items() if rank in there}
    not_free = {*there, *taken, *world.switched}
    return [rank for rank in home.experts if rank not in not_free]


def _being_loaded(world: World, present: Membership) -> set[ExpertOfLayer]:
    """Experts on their way into spare slots of those who are there."""
    return {(x.layer, x.expert) for x in world.loading if x.rank in present.placement.slots}


def _being_switched(world: World) -> set[ExpertOfLayer]:
    """Experts that ranks are loading for the role they are to have."""
    layers = world.membership.placement.layers
    return {
        (layer, ExpertId(expert))
        for rank in world.launching
        if rank in world.switched and rank in world.tables
        for layer, row in zip(layers, world.tables[rank], strict=True)
        for expert in row
        if expert != EMPTY
    }


def _refuse_masking(world: World, present: Membership, policy: Policy) -> str | None:
    fraction, count = present.missing_fraction, len(present.missing)
    if not count or set(present.missing) <= set(world.membership.missing):
        return None
    if not world.maskable:
        return f"{count} experts have no replica left and this model's router cannot be masked"
    if fraction > policy.max_missing_fraction:
        return (
            f"{fraction:.1%} of a layer's experts would be missing, more than "
            f"--max-missing-fraction {policy.max_missing_fraction:.1%} allows "
            "(--redundant-experts would have covered them)"
        )
    return None


# ---- going on ---------------------------------------------------------------------------------


def _continue(
    world: World,
    present: Membership,
    lost: Lost,
    reloads: tuple[Reload, ...] = (),
    background: tuple[Reload, ...] = (),
) -> Continue:
    before = world.membership
    missed = set(before.missing)
    masked = tuple(pair for pair in present.missing if pair not in missed)
    dropped = lost - frozenset(present.members)
    held = sum(before.num_held.get(rank, 0) for rank in dropped)
    gone = len(masked) + len({(x.layer, x.expert) for x in reloads} - missed)
    back = [r for r in world.ready if r in world.switched and r in present.members]
    return Continue(
        membership=present.with_dense_group().at(Epoch(before.epoch + 1)),
        migrations=tuple(_migrate(world, present)),
        experts_dropped=max(0, held - gone),
        masked=masked,
        reason=reasons.reason(world, dropped, present, masked, reloads, background)
        + reasons.about_dense(world, present),
        reloads=reloads,
        background=background,
        taken=world.loaded,
        role_switched=next(iter(back), None),
    )


def _migrate(world: World, present: Membership) -> list[Migration]:
    """Sequences without a living owner go, oldest first, to the rank with the fewest tokens."""
    load = dict.fromkeys(present.attention, 0)
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
    assert len({move.seq_id for move in migrations}) == len(migrations), "a sequence moves twice"
    return migrations
