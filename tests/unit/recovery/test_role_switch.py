"""Attention ranks that become expert ranks: literal worlds in, literal plans out."""

from dataclasses import replace
from typing import Any

import pytest
from unit import memberships
from unit.memberships import LAYERS, membership, of_roles

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.dense_groups import DenseGroups, form_groups
from revivemoe.membership.placement import ExpertPlacement, Reload, Table
from revivemoe.membership.topology import Topology, collocated, disaggregated, switched
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import (
    Continue,
    GiveUp,
    Migration,
    RecoveryPlan,
    Restart,
    describe_plan,
)
from revivemoe.recovery.planner import plan_recovery, refuse_switch
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.role_switch import RoleSwitch, choose_switches
from revivemoe.recovery.world import SequenceView, World

HOME = disaggregated(Epoch(1), 3, 3)
"""Attention on 0, 1, 2; experts on 3, 4, 5."""
TABLES: dict[int, Table] = {
    3: ((0, 1), (5, 2)),
    4: ((2, 3), (0, 4)),
    5: ((4, 5), (1, 3)),
}
"""Six experts in two layers, each of them once; another order in the second layer."""
LOST_WITH_3 = ((0, 1), (2, 5))
"""What a rank holds that takes them over."""
LOST_WITH_4 = ((2, 3), (0, 4))
TWO_OF_SIX = 2 / 6
MEANWHILE = Policy(serve_masked_meanwhile=True, max_missing_fraction=0.9)


def placed(tables: dict[int, Table]) -> ExpertPlacement:
    return memberships.placed(tables, num_experts=6)


def world(
    topology: Topology | None = None,
    placement: ExpertPlacement | None = None,
    dense: DenseGroups | None = None,
    **fields: Any,
) -> World:
    """What is not given is as at the start, in epoch 4."""
    topology = topology or of_roles(4, (0, 1, 2), (3, 4, 5))
    given: dict[str, Any] = {
        "membership": membership(placement or placed(TABLES), topology, dense),
        "sequences": (),
        "maskable": True,
        "recent_recoveries": 0,
        "home": HOME,
        "home_placement": placed(TABLES),
    }
    return World(**given | fields)


def lost(*ranks: int) -> list[Fault]:
    return [Fault(RankId(r), "process_exit", "gone") for r in ranks]


def view(seq_id: int, owner: int | None, tokens: int, orphan: bool = False) -> SequenceView:
    rank = None if owner is None else RankId(owner)
    return SequenceView(SeqId(seq_id), rank, tokens, arrival=seq_id, orphan=orphan)


def loads(rank: int, table: Table) -> tuple[Reload, ...]:
    """All of a full table."""
    return tuple(
        Reload(RankId(rank), layer, SlotId(slot), ExpertId(expert))
        for layer, row in zip(LAYERS, table, strict=True)
        for slot, expert in enumerate(row)
    )


def go_on(plan: RecoveryPlan) -> Continue:
    assert isinstance(plan, Continue), plan
    assert "\n" not in plan.reason
    return plan


def roles(plan: Continue) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Attention ranks and expert ranks; the members are just these, in this order."""
    present = plan.membership
    assert present.members == (*present.attention, *present.experts)
    return present.attention, present.experts


BUSY = (view(1, 0, 30), view(2, 1, 5), view(3, 2, 20), view(4, 1, 6), view(5, None, 99))
"""Rank 1 has the fewest tokens, although most sequences."""


# ---- before the next step -------------------------------------------------------------------


def test_the_cheapest_attention_rank_takes_the_lost_ones_place() -> None:
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(3), Policy()))
    assert plan.membership.topology == of_roles(5, (0, 2), (1, 4, 5))
    assert plan.switches == (RoleSwitch(RankId(1), RankId(3), LOST_WITH_3),)
    assert plan.reloads == (
        Reload(RankId(1), LayerId(1), SlotId(0), ExpertId(0)),
        Reload(RankId(1), LayerId(1), SlotId(1), ExpertId(1)),
        Reload(RankId(1), LayerId(2), SlotId(0), ExpertId(2)),
        Reload(RankId(1), LayerId(2), SlotId(1), ExpertId(5)),
    )
    assert plan.membership.placement == placed({1: LOST_WITH_3, 4: TABLES[4], 5: TABLES[5]})
    assert (plan.switch_aside, plan.role_switched) == (False, 1)
    assert (plan.masked, plan.background, plan.experts_dropped) == ((), (), 0)
    assert plan.reason == (
        "rank 3 lost; rank 1 becomes an expert rank in the place of rank 3 and loads 4 experts "
        "before the next step"
    )


@pytest.mark.parametrize(
    ("dead", "experts"), [(3, (1, 4, 5)), (4, (3, 1, 5)), (5, (3, 4, 1))], ids=str
)
def test_every_place_can_be_taken(dead: int, experts: tuple[int, ...]) -> None:
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(dead), Policy()))
    assert roles(plan) == ((0, 2), experts)


def test_only_the_donors_sequences_move() -> None:
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(3), Policy()))
    assert plan.migrations == (
        Migration(SeqId(2), RankId(2), 5),  # 0: 30, 2: 20
        Migration(SeqId(4), RankId(2), 6),  # 0: 30, 2: 25
    )


@pytest.mark.parametrize("cheapest", [0, 1, 2])
def test_the_donor_is_the_one_with_the_fewest_tokens(cheapest: int) -> None:
    sequences = tuple(view(r, r, 10 + (r != cheapest)) for r in (2, 1, 0))
    plan = go_on(plan_recovery(world(sequences=sequences), lost(4), Policy()))
    assert [s.rank for s in plan.switches] == [cheapest]


def test_of_equals_the_lowest_id_is_the_donor() -> None:
    sequences = (view(0, 0, 7), view(1, 1, 7), view(2, 2, 7))
    plan = go_on(plan_recovery(world(sequences=sequences), lost(4), Policy()))
    assert plan.role_switched == 0


def test_an_attention_rank_lost_with_it_is_no_donor() -> None:
    """Rank 1 would have been; of the two that are left, rank 2 costs less."""
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(3, 1), Policy()))
    assert plan.membership.topology == of_roles(5, (0,), (2, 4, 5))
    assert plan.switches == (RoleSwitch(RankId(2), RankId(3), LOST_WITH_3),)
    assert [(m.seq_id, m.to) for m in plan.migrations] == [(2, 0), (3, 0), (4, 0)]
    assert plan.reason.startswith("ranks 1, 3 lost; rank 2 becomes an expert rank in the place of")


def test_a_process_that_is_gone_is_as_lost_as_an_accused_one() -> None:
    plan = plan_recovery(world(sequences=BUSY, gone=(RankId(3),)), [], Policy())
    assert plan == plan_recovery(world(sequences=BUSY), lost(3), Policy())


def test_only_what_has_no_replica_is_loaded() -> None:
    """Of rank 3's experts only 1 in the first layer and 5 in the second are nowhere else."""
    tables: dict[int, Table] = {
        3: ((0, 1, 2), (5, 2, 0)),
        4: ((2, 3, 0), (0, 4, -1)),
        5: ((4, 5, -1), (1, 3, 2)),
    }
    asked = world(placement=placed(tables))
    plan = go_on(plan_recovery(asked, lost(3), Policy(repair=("role_switch",))))
    (switch,) = plan.switches
    assert switch.table == ((1, -1, -1), (5, -1, -1))
    assert plan.reloads == (
        Reload(RankId(0), LayerId(1), SlotId(0), ExpertId(1)),
        Reload(RankId(0), LayerId(2), SlotId(0), ExpertId(5)),
    )
    assert plan.membership.missing == ()
    assert plan.experts_dropped == 4


def test_what_was_missing_before_is_loaded_as_well() -> None:
    """Rank 4 was lost long ago, when no rank could be spared for its experts."""
    left = placed({3: TABLES[3], 5: TABLES[5]})
    asked = world(
        placement=left, topology=of_roles(6, (0, 1, 2), (3, 5)), sequences=BUSY, gone=(RankId(4),)
    )
    plan = go_on(plan_recovery(asked, lost(5), Policy()))
    first, second = plan.switches
    assert (first.replaces, second.replaces) == (4, 5)
    assert first.table == ((2, 3), (0, 1))
    assert second.table == ((4, 5), (3, 4))
    assert plan.membership.topology == of_roles(7, (0,), (3, 1, 2))
    assert plan.membership.missing == ()


def test_two_expert_ranks_at_once_take_two_donors() -> None:
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(4, 3), Policy()))
    first, second = plan.switches
    assert (first.rank, first.replaces) == (1, 3)
    assert (second.rank, second.replaces) == (2, 4), "the next cheapest"
    assert first.table == ((0, 1), (0, 2))
    assert second.table == ((2, 3), (4, 5))
    assert plan.membership.topology == of_roles(5, (0,), (1, 2, 5))
    assert plan.reloads == (*loads(1, first.table), *loads(2, second.table))
    assert plan.membership.placement == placed({1: first.table, 2: second.table, 5: TABLES[5]})
    assert plan.role_switched == 1
    assert plan.reason.endswith(
        "rank 1 becomes an expert rank in the place of rank 3 and rank 2 becomes an expert rank "
        "in the place of rank 4 and loads 8 experts before the next step"
    )


def test_no_more_donors_than_the_missing_experts_need() -> None:
    """Rank 5 has all of rank 4's: two ranks are lost, but the experts of one."""
    tables = {3: TABLES[3], 4: TABLES[4], 5: TABLES[4], 6: TABLES[5]}
    home = disaggregated(Epoch(4), 3, 4)
    four = world(placement=placed(tables), topology=home, home=home)
    plan = go_on(plan_recovery(four, lost(3, 4), Policy(repair=("role_switch",))))
    assert [(s.rank, s.replaces) for s in plan.switches] == [(0, 3)]
    assert roles(plan) == ((1, 2), (0, 5, 6))


def test_a_place_whose_rank_comes_back_is_not_taken() -> None:
    """Rank 3 is being started anew already: the donor comes last, and both have a place."""
    under_way = world(launching=(RankId(3),))
    plan = go_on(plan_recovery(under_way, lost(3), Policy()))
    assert [(s.rank, s.replaces) for s in plan.switches] == [(0, None)]
    assert roles(plan) == ((1, 2), (4, 5, 0))
    assert "rank 0 becomes an expert rank and loads 4 experts" in plan.reason


def test_groups_of_dense_layers_do_without_the_donor() -> None:
    dense = form_groups((RankId(0), RankId(1)), 2)
    plan = go_on(plan_recovery(world(sequences=BUSY, dense=dense), lost(3), Policy()))
    assert plan.membership.dense is not None
    assert plan.membership.dense.healthy(plan.membership.attention) == ((0, 2),)


# ---- the policy's order ---------------------------------------------------------------------


def test_spare_slots_come_before_a_switch_unless_the_policy_says_otherwise() -> None:
    roomy = {rank: tuple((*row, -1) for row in table) for rank, table in TABLES.items()}
    asked = world(placement=placed(roomy), sequences=BUSY)
    plan = go_on(plan_recovery(asked, lost(3), Policy()))
    assert plan.switches == ()
    assert plan.role_switched is None
    assert len(plan.reloads) == 4
    other = Policy(repair=("role_switch", "reload", "mask"))
    plan = go_on(plan_recovery(asked, lost(3), other))
    assert plan.switches == (RoleSwitch(RankId(1), RankId(3), ((0, 1, -1), (2, 5, -1))),)
    assert len(plan.reloads) == 4, "an empty slot is nothing to load"


def test_masking_comes_first_if_the_policy_says_so() -> None:
    policy = Policy(repair=("mask", "role_switch"), max_missing_fraction=TWO_OF_SIX)
    plan = go_on(plan_recovery(world(), lost(3), policy))
    assert plan.switches == ()
    assert len(plan.masked) == 4
    beyond = replace(policy, max_missing_fraction=0.3)
    assert go_on(plan_recovery(world(), lost(3), beyond)).role_switched == 0


def test_a_policy_without_role_switches_makes_none() -> None:
    policy = Policy(repair=("reload", "mask", "restart"), max_missing_fraction=TWO_OF_SIX)
    assert go_on(plan_recovery(world(), lost(3), policy)).masked == ((1, 0), (1, 1), (2, 2), (2, 5))


LAST = {
    "topology": of_roles(4, (1,), (3, 4, 5)),
    "sequences": (view(0, 1, 10),),
    "relaunchable": (RankId(3),),
}
"""One attention rank is left."""


def test_the_last_attention_rank_is_never_a_donor() -> None:
    masking = Policy(max_missing_fraction=TWO_OF_SIX)
    plan = go_on(plan_recovery(world(**LAST), lost(3), masking))
    assert (plan.switches, len(plan.masked)) == ((), 4), "masked, the next in the policy's order"
    assert roles(plan) == ((1,), (4, 5))
    plan = plan_recovery(world(**LAST), lost(3), Policy())
    assert isinstance(plan, Restart), "neither is possible"
    assert plan.ranks == (3,)
    assert (
        "no attention rank can be spared to become an expert rank for 4 experts "
        "(only one without experts can, and never the last one)"
    ) in plan.reason
    plan = plan_recovery(world(**LAST), lost(3), Policy(repair=("reload", "role_switch")))
    assert isinstance(plan, GiveUp)


def test_a_switch_that_cannot_hold_all_experts_is_none() -> None:
    """Two donors would be needed, and there is one."""
    two = world(topology=of_roles(4, (0, 1), (3, 4, 5)), relaunchable=(RankId(3), RankId(4)))
    plan = plan_recovery(two, lost(3, 4), Policy())
    assert isinstance(plan, Restart)
    assert "to become an expert rank for 4 experts" in plan.reason, "those of the second rank"
    plan = go_on(plan_recovery(two, lost(3, 4), Policy(max_missing_fraction=4 / 6)))
    assert (plan.switches, len(plan.masked)) == ((), 8)


def test_no_switch_while_experts_cannot_be_loaded() -> None:
    broken = world(can_load=False, relaunchable=(RankId(3),))
    plan = plan_recovery(broken, lost(3), Policy())
    assert isinstance(plan, Restart)
    assert "experts could not be loaded a moment ago" in plan.reason


@pytest.mark.parametrize("dead", [(3,), (0, 3), (3, 4, 5), (0, 1)], ids=str)
def test_collocated_ranks_never_switch(dead: tuple[int, ...]) -> None:
    topology = collocated(Epoch(4), 6)
    tables = dict.fromkeys(range(3), ((-1, -1), (-1, -1))) | TABLES
    asked = world(placement=placed(tables), topology=topology, home=topology)
    plan = plan_recovery(asked, lost(*dead), Policy(repair=("role_switch", "mask")))
    assert not isinstance(plan, Continue) or not plan.switches
    if 3 in dead:
        assert isinstance(plan, GiveUp)
        assert "only one without experts can" in plan.reason


# ---- all expert ranks -----------------------------------------------------------------------


HALVES: dict[int, Table] = {3: ((0, 1, 2), (5, 2, 1)), 4: ((3, 4, 5), (0, 3, 4))}
TWO: dict[str, Any] = {
    "topology": of_roles(4, (0, 1, 2), (3, 4)),
    "placement": placed(HALVES),
    "home": disaggregated(Epoch(1), 3, 2),
    "sequences": BUSY,
}
"""Two expert ranks."""
ANYTHING = Policy(serve_masked_meanwhile=True, max_missing_fraction=1)


@pytest.mark.parametrize("policy", [Policy(), ANYTHING], ids=["default", "meanwhile"])
def test_without_any_expert_rank_everybody_waits_for_the_switch(policy: Policy) -> None:
    plan = go_on(plan_recovery(world(**TWO), lost(3, 4), policy))
    assert plan.membership.topology == of_roles(5, (0,), (1, 2))
    table_1, table_2 = ((0, 1, 2),) * 2, ((3, 4, 5),) * 2
    assert plan.switches == (
        RoleSwitch(RankId(1), RankId(3), table_1),
        RoleSwitch(RankId(2), RankId(4), table_2),
    )
    assert plan.membership.placement == placed({1: table_1, 2: table_2})
    assert plan.reloads == (*loads(1, table_1), *loads(2, table_2))
    assert (plan.switch_aside, plan.masked) == (False, ())


def test_without_any_expert_rank_the_policy_still_has_to_allow_a_switch() -> None:
    asked = world(**TWO, relaunchable=(RankId(3), RankId(4)))
    plan = plan_recovery(asked, lost(3, 4), Policy(repair=("reload", "mask", "restart")))
    assert isinstance(plan, Restart)
    assert plan.ranks == (3, 4)


def test_without_any_expert_rank_and_too_few_donors_the_ranks_start_anew() -> None:
    asked = world(relaunchable=(RankId(3), RankId(4), RankId(5)))
    plan = plan_recovery(asked, lost(3, 4, 5), Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == (3, 4, 5)
    assert plan.reason.startswith("no expert rank is left (ranks 3, 4, 5 lost)")


def test_experts_do_not_become_attention_ranks() -> None:
    asked = world(relaunchable=(RankId(0), RankId(1), RankId(2)))
    plan = plan_recovery(asked, lost(0, 1, 2), Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == (0, 1, 2)


# ---- in the background ----------------------------------------------------------------------


def test_in_the_background_the_donor_is_outside_and_the_experts_are_masked() -> None:
    plan = go_on(plan_recovery(world(sequences=BUSY), lost(3), MEANWHILE))
    assert plan.switch_aside
    assert plan.membership.topology == of_roles(5, (0, 2), (4, 5))
    assert plan.switches == (RoleSwitch(RankId(1), RankId(3), LOST_WITH_3),)
    assert plan.membership.placement == placed({4: TABLES[4], 5: TABLES[5]})
    assert plan.masked == ((1, 0), (1, 1), (2, 2), (2, 5))
    assert (plan.reloads, plan.background) == ((), ()), "the donor knows from its switch"
    assert [(m.seq_id, m.to) for m in plan.migrations] == [(2, 2), (4, 2)]
    assert (plan.role_switched, plan.experts_dropped) == (1, 0)
    assert plan.reason == (
        "rank 3 lost; 4 experts over 2 layers of 6 have no replica: mask them, which the policy "
        "allows, and go on degraded; rank 1 becomes an expert rank in the place of rank 3 and "
        "loads 4 experts beside the others, which go on meanwhile"
    )
    told = describe_plan(plan)
    assert (told["members"], told["role_switched"]) == ([0, 2, 4, 5], 1)


@pytest.mark.parametrize("case", ["bound", "router", "policy"])
def test_what_may_not_be_masked_is_loaded_before_the_next_step(case: str) -> None:
    policy = replace(
        MEANWHILE,
        max_missing_fraction=0.3 if case == "bound" else 0.9,
        serve_masked_meanwhile=case != "policy",
    )
    plan = go_on(plan_recovery(world(maskable=case != "router"), lost(3), policy))
    assert (plan.switch_aside, plan.masked) == (False, ())
    assert plan.membership.missing == ()
    assert roles(plan) == ((1, 2), (0, 4, 5))


SWITCHING: dict[str, Any] = {
    "topology": of_roles(5, (0, 2), (4, 5)),
    "placement": placed({4: TABLES[4], 5: TABLES[5]}),
    "home": switched(HOME, RankId(1), RankId(3)),
    "switched": {RankId(1): RankId(3)},
    "tables": {RankId(1): LOST_WITH_3},
    "launching": (RankId(1),),
    "gone": (RankId(1), RankId(3)),
}
"""Rank 3 is lost and rank 1 on its way to take its place, beside the others."""


def test_what_one_rank_is_loading_is_not_promised_to_another() -> None:
    plan = go_on(plan_recovery(world(**SWITCHING), lost(4), MEANWHILE))
    (switch,) = plan.switches
    assert switch.rank == 0
    assert switch.table == LOST_WITH_4
    assert roles(plan) == ((2,), (5,))
    assert plan.masked == ((1, 2), (1, 3), (2, 0), (2, 4)), "the others are masked already"


def test_a_loss_without_experts_leaves_the_switch_alone() -> None:
    sequences = (view(1, 0, 10), view(2, 2, 10))
    plan = go_on(plan_recovery(world(**SWITCHING, sequences=sequences), lost(0), MEANWHILE))
    assert plan.membership.topology == of_roles(6, (2,), (4, 5))
    assert (plan.switches, plan.masked, plan.reloads) == ((), (), ())
    assert plan.migrations == (Migration(SeqId(1), RankId(2), 10),)


def test_a_new_domain_does_not_begin_the_switch_anew() -> None:
    plan = go_on(plan_recovery(world(**SWITCHING), [], MEANWHILE))
    assert (plan.switches, plan.role_switched) == ((), None)
    assert plan.membership.topology == of_roles(6, (0, 2), (4, 5))


def test_when_the_donor_dies_meanwhile_another_one_takes_over() -> None:
    dead = SWITCHING | {"launching": (), "tables": {}}
    plan = go_on(plan_recovery(world(**dead), [], MEANWHILE))
    assert plan.switches == (RoleSwitch(RankId(0), RankId(3), LOST_WITH_3),)
    assert roles(plan) == ((2,), (4, 5))


def test_a_rank_that_is_started_anew_is_no_promise() -> None:
    """It is launching too, but into its old role: what a table says does not count."""
    started = SWITCHING | {"switched": {}, "home": HOME}
    plan = go_on(plan_recovery(world(**started), [], MEANWHILE))
    assert [s.rank for s in plan.switches] == [0]


READY = SWITCHING | {"launching": (), "ready": (RankId(1),)}


def test_the_donor_that_is_ready_is_taken_in_as_an_expert_rank() -> None:
    plan = go_on(plan_recovery(world(**READY), [], MEANWHILE))
    assert plan.membership.topology == of_roles(6, (0, 2), (1, 4, 5))
    assert plan.membership.placement == placed({1: LOST_WITH_3, 4: TABLES[4], 5: TABLES[5]})
    assert plan.role_switched == 1
    assert (plan.switches, plan.reloads, plan.masked, plan.migrations) == ((), (), (), ())
    assert plan.reason == "ranks 1 are taken in"


def test_the_donor_is_taken_in_with_a_fault_of_another() -> None:
    plan = go_on(plan_recovery(world(**READY), lost(5), Policy()))
    assert [(s.rank, s.table) for s in plan.switches] == [(0, ((4, 5), (1, 3)))]
    assert set(plan.membership.experts) == {0, 1, 4}
    assert plan.membership.attention == (2,)
    assert plan.membership.missing == ()


def test_a_donor_that_is_accused_is_not_taken_in() -> None:
    plan = go_on(plan_recovery(world(**READY), lost(1), MEANWHILE))
    assert 1 not in plan.membership.members
    assert [(s.rank, s.table) for s in plan.switches] == [(0, LOST_WITH_3)]


def test_a_rank_that_comes_back_as_it_was_has_its_old_role() -> None:
    """Rank 3 is back, and so is rank 1, whose new process has forgotten the switch."""
    back = {
        "home": HOME,
        "switched": {},
        "launching": (),
        "ready": (RankId(1), RankId(3)),
        "tables": {RankId(1): (), RankId(3): TABLES[3]},
    }
    plan = go_on(plan_recovery(world(**SWITCHING | back), [], MEANWHILE))
    assert plan.membership.topology == of_roles(6, (0, 1, 2), (3, 4, 5))
    assert plan.membership.placement == placed(TABLES)
    assert plan.role_switched is None


def test_whose_place_was_taken_comes_back_beside_its_successor() -> None:
    switched_in = {
        "topology": of_roles(6, (0, 2), (1, 4, 5)),
        "placement": placed({1: LOST_WITH_3, 4: TABLES[4], 5: TABLES[5]}),
        "launching": (),
        "ready": (RankId(3),),
        "tables": {RankId(3): TABLES[3]},
        "gone": (RankId(3),),
    }
    plan = go_on(plan_recovery(world(**SWITCHING | switched_in), [], MEANWHILE))
    assert plan.membership.topology == of_roles(7, (0, 2), (1, 3, 4, 5))
    assert plan.membership.missing == ()
    assert plan.role_switched is None, "that of rank 1 was reported before"


# ---- asked for ------------------------------------------------------------------------------

REDUNDANT: dict[int, Table] = {
    3: ((0, 1, 2), (5, 2, 0)),
    4: ((2, 3, 0), (0, 4, 5)),
    5: ((4, 5, 1), (1, 3, 2)),
}
"""Three experts of each layer twice."""
WITHOUT_3: dict[str, Any] = {
    "topology": of_roles(4, (0, 1, 2), (4, 5)),
    "placement": placed({4: REDUNDANT[4], 5: REDUNDANT[5]}),
    "home_placement": placed(REDUNDANT),
    "gone": (RankId(3),),
}
"""Rank 3 is lost, and no expert with it: three have one replica fewer in each layer."""


@pytest.mark.parametrize("policy", [Policy(), Policy(repair=("mask",))], ids=["default", "mask"])
def test_a_switch_that_is_asked_for_restores_replicas_beside_the_others(policy: Policy) -> None:
    asked = world(**WITHOUT_3, sequences=BUSY, switch=RankId(2))
    plan = go_on(plan_recovery(asked, [], policy))
    assert plan.switch_aside
    assert plan.switches == (RoleSwitch(RankId(2), RankId(3), ((0, 1, 2), (0, 2, 5))),)
    assert plan.membership.topology == of_roles(5, (0, 1), (4, 5))
    assert plan.migrations == (Migration(SeqId(3), RankId(1), 20),)
    assert (plan.masked, plan.experts_dropped, plan.role_switched) == ((), 0, 2)
    assert plan.reason.endswith(
        "rank 2 becomes an expert rank in the place of rank 3 and loads 6 experts beside the "
        "others, which go on meanwhile"
    )


def test_missing_experts_go_before_lost_replicas() -> None:
    """Rank 5 is lost as well: 4 and 5 are missing in the first layer, 1, 2 and 3 in the second."""
    left = WITHOUT_3 | {
        "topology": of_roles(4, (0, 1), (4,)),
        "placement": placed({4: REDUNDANT[4]}),
        "switch": RankId(1),
    }
    (switch,) = go_on(plan_recovery(world(**left), [], Policy())).switches
    assert switch.table == ((1, 4, 5), (1, 2, 3))
    assert switch.replaces == 3, "the first of the places"


def test_a_rank_lost_before_its_turn_does_not_switch() -> None:
    plan = go_on(plan_recovery(world(**WITHOUT_3, switch=RankId(2)), lost(2), Policy()))
    assert (plan.switches, plan.role_switched) == ((), None)
    assert roles(plan) == ((0, 1), (4, 5))


def test_a_switch_that_makes_no_sense_any_more_is_not_made() -> None:
    plan = go_on(plan_recovery(world(switch=RankId(2)), [], Policy()))
    assert (plan.switches, plan.role_switched) == ((), None)
    assert roles(plan) == ((0, 1, 2), (3, 4, 5))
    last = WITHOUT_3 | {"switch": RankId(2)}
    plan = go_on(plan_recovery(world(**last), lost(0, 1), Policy()))
    assert (plan.switches, roles(plan)) == ((), ((2,), (4, 5)))


def test_a_switch_that_would_do_is_not_refused() -> None:
    assert refuse_switch(world(**WITHOUT_3), RankId(0)) is None
    missing = world(**SWITCHING | {"launching": (), "tables": {}})
    assert refuse_switch(missing, RankId(0)) is None


def test_refusals_say_why() -> None:
    nothing = "no expert is missing, and none has fewer replicas than it had at the start"
    assert refuse_switch(world(), RankId(0)) == nothing
    assert refuse_switch(world(home_placement=None), RankId(0)) == nothing
    for rank in (4, 9):
        no_role = f"rank {rank} has no attention role to give up"
        assert refuse_switch(world(**WITHOUT_3), RankId(rank)) == no_role
    last = world(**WITHOUT_3 | {"topology": of_roles(4, (2,), (4, 5))})
    assert refuse_switch(last, RankId(2)) == "rank 2 is the last attention rank"
    together = world(**WITHOUT_3 | {"topology": Topology(Epoch(4), (4, 5), (4, 5), (4, 5))})
    assert refuse_switch(together, RankId(5)) == (
        "rank 5 holds experts already (--expert-ranks puts them on ranks of their own)"
    )


# ---- the choice by itself -------------------------------------------------------------------


def choose(
    wanted: list[tuple[int, int]], num_slots: int, places: list[int], attention: int = 4
) -> tuple[RoleSwitch, ...] | str:
    pairs = [(LayerId(layer), ExpertId(expert)) for layer, expert in wanted]
    topology = disaggregated(Epoch(1), attention, 1)
    placement = placed({attention: ((), ())})
    tokens = {RankId(0): 9, RankId(1): 3, RankId(2): 5}
    return choose_switches(
        topology, placement, pairs, num_slots, tokens, [RankId(r) for r in places]
    )


def test_layers_are_filled_side_by_side() -> None:
    """Five in the first layer and one in the second, two slots: three ranks, the cheapest first."""
    wanted = [(1, 0), (1, 1), (2, 3), (1, 2), (1, 3), (1, 4)]
    assert choose(wanted, 2, [7, 8]) == (
        RoleSwitch(RankId(3), RankId(7), ((0, 1), (3, -1))),
        RoleSwitch(RankId(1), RankId(8), ((2, 3), (-1, -1))),
        RoleSwitch(RankId(2), None, ((4, -1), (-1, -1))),
    )
    refused = choose([*wanted, (1, 5), (2, 0), (2, 1), (2, 2), (2, 4)], 1, [7, 8])
    assert isinstance(refused, str)
    assert "for 5 experts" in refused, "three of the first layer and two of the second"


def test_nothing_wanted_is_no_switch_and_no_slots_are_no_use() -> None:
    assert choose([], 2, [7]) == ()
    assert isinstance(choose([(1, 0)], 0, [7]), str)


def test_empty_slots_are_not_loaded() -> None:
    switch = RoleSwitch(RankId(1), None, ((-1, 4), (0, -1)))
    assert switch.loads(LAYERS) == (
        Reload(RankId(1), LayerId(1), SlotId(1), ExpertId(4)),
        Reload(RankId(1), LayerId(2), SlotId(0), ExpertId(0)),
    )


# ---- what went wrong once -------------------------------------------------------------------


def test_a_place_is_taken_once() -> None:
    """Rank 1 has rank 3's place; what replaces rank 4 has the place of rank 4."""
    plan = go_on(plan_recovery(world(**READY), lost(4), Policy()))
    assert [(s.rank, s.replaces) for s in plan.switches] == [(0, 4)]
    assert roles(plan) == ((2,), (1, 0, 5))


@pytest.mark.parametrize("policy", [MEANWHILE, Policy()], ids=["meanwhile", "default"])
def test_what_is_being_loaded_into_spare_slots_needs_no_switch(policy: Policy) -> None:
    """Rank 3's experts are on their way into spare slots of 4 and 5 when rank 0 is lost."""
    loading = tuple(
        Reload(RankId(rank), LayerId(layer), SlotId(2), ExpertId(expert))
        for rank, layer, expert in ((4, 1, 0), (5, 1, 1), (4, 2, 2), (5, 2, 5))
    )
    left: dict[int, Table] = {4: ((2, 3, -1), (0, 4, -1)), 5: ((4, 5, -1), (1, 3, -1))}
    asked = world(
        topology=of_roles(5, (0, 1, 2), (4, 5)), placement=placed(left), loading=loading,
        gone=(RankId(3),),
    )  # fmt: skip
    plan = go_on(plan_recovery(asked, lost(0), policy))
    assert (plan.switches, roles(plan)) == ((), ((1, 2), (4, 5)))


def test_promised_experts_that_are_lost_meanwhile_are_masked_only_if_the_policy_allows() -> None:
    """Rank 2 loads replicas that somebody asked for; then rank 4 is lost, and with it the last
    ones of some of them. A router that cannot be masked must not be.
    """
    under_way = {
        "topology": of_roles(5, (0, 1), (4, 5)),
        "launching": (RankId(2),),
        "switched": {RankId(2): RankId(3)},
        "tables": {RankId(2): ((0, 1, 2), (0, 2, 5))},
        "home": switched(HOME, RankId(2), RankId(3)),
        "maskable": False,
    }
    plan = plan_recovery(world(**WITHOUT_3 | under_way), lost(4), Policy())
    assert not isinstance(plan, Continue) or plan.masked == ()


def test_an_asked_switch_does_not_mask_what_is_lost_at_the_same_time() -> None:
    asked = world(switch=RankId(2), maskable=False)
    plan = go_on(plan_recovery(asked, lost(3), Policy()))
    assert plan.masked == ()


def test_dropped_replicas_are_counted_although_others_are_reloaded() -> None:
    """Rank 3 alone had 1 in the first layer; three were missing before; all four are loaded."""
    tables: dict[int, Table] = {3: ((4, 1), (0, 3)), 4: ((2, 0), (0, 4)), 5: ((4, 5), (2, 3))}
    asked = world(placement=placed(tables))
    plan = go_on(plan_recovery(asked, lost(3), Policy(repair=("role_switch",))))
    assert len(plan.reloads) == 4
    assert plan.experts_dropped == 3


def test_nobody_switches_while_the_expert_rank_itself_is_being_started() -> None:
    """After the loss of all, attention ranks were ready first, and one became an expert rank."""
    starting = world(launching=(RankId(3),), awaited=frozenset({RankId(3)}))
    plan = plan_recovery(starting, lost(3), Policy(max_missing_fraction=0.0))
    assert isinstance(plan, Restart)
    assert plan.ranks == ()
    assert "waiting for ranks 3" in plan.reason


def test_a_donor_that_was_fenced_before_it_got_to_its_new_role_has_empty_slots() -> None:
    """It says that it has none; what it was to hold is planned again, as loads."""
    donor = RankId(1)
    fenced = world(
        of_roles(4, (0, 2), (4, 5)),
        placed({4: TABLES[4], 5: TABLES[5]}),
        home=switched(HOME, donor, RankId(3)),
        switched={donor: RankId(3)},
        ready=(donor,),
        tables={donor: LOST_WITH_3},
        held={donor: ()},
    )
    plan = go_on(plan_recovery(fenced, [], Policy()))
    assert plan.membership.missing == ()
    assert {(x.rank, x.layer, x.expert) for x in plan.reloads} == {
        (donor, layer, expert)
        for layer, row in zip(LAYERS, LOST_WITH_3, strict=True)
        for expert in row
    }
