from dataclasses import replace
from typing import Any

import pytest
from unit.memberships import LAYERS, membership, placed

from revivemoe.ids import Epoch, ExpertId, LayerId, RankId, SeqId, SlotId
from revivemoe.membership.placement import ExpertPlacement, Reload
from revivemoe.membership.topology import Topology, collocated, disaggregated
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue, GiveUp, Migration, RecoveryPlan, Restart
from revivemoe.recovery.planner import DOMAIN_FAILURES, plan_recovery
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.world import SequenceView, World


def held(*ranks: tuple[int, ...], num_experts: int = 4) -> ExpertPlacement:
    """What each rank holds, of both layers; -1 for an empty slot, () without the expert role."""
    return placed({r: (row, row) for r, row in enumerate(ranks) if row}, num_experts)


TWICE = held((0, 1, 3), (1, 2, 0), (2, 3, -1))
"""Every expert on two ranks."""
ONCE = held((0,), (1,), (2,), (3,))
"""Every expert on one rank, and no room."""
ONE_EACH, TWO_AND_ONE = disaggregated(Epoch(4), 1, 1), disaggregated(Epoch(4), 2, 1)
APART = held((), (), (0, 1, 2, 3))
"""The experts on a rank of their own."""
ALL_MAY = Policy(max_missing_fraction=0.99)


def world(
    placement: ExpertPlacement = TWICE, topology: Topology | None = None, **fields: Any
) -> World:
    """Without a topology: collocated, those that have slots."""
    given: dict[str, Any] = {
        "membership": membership(placement, topology, epoch=4),
        "sequences": (),
        "maskable": True,
        "recent_recoveries": 0,
    }
    return World(**given | fields)


def lost(*ranks: int) -> list[Fault]:
    return [Fault(RankId(r), "process_exit", "gone") for r in ranks]


def view(seq_id: int, owner: int | None, tokens: int = 10, arrival: int = 0) -> SequenceView:
    return SequenceView(SeqId(seq_id), None if owner is None else RankId(owner), tokens, arrival)


def go_on(plan: RecoveryPlan) -> Continue:
    assert isinstance(plan, Continue), plan
    return plan


def give_up(plan: RecoveryPlan) -> str:
    assert isinstance(plan, GiveUp), plan
    assert plan.reason
    assert "\n" not in plan.reason
    return plan.reason


# ---- membership and experts -----------------------------------------------------------------


def test_replicas_cover_a_loss() -> None:
    plan = go_on(plan_recovery(world(), lost(1), Policy()))
    survivors = Topology(Epoch(5), (0, 2), (0, 2), (0, 2))
    assert plan.membership == membership(TWICE.without(frozenset({RankId(1)})), survivors)
    assert plan.experts_dropped == 3 * 2, "three replicas in each of two layers"
    assert plan.masked == ()
    assert plan.migrations == ()
    assert plan.reason == (
        "rank 1 lost; every lost expert has a replica: drop the lost ones and go on"
    )


def test_empty_slots_are_no_replicas() -> None:
    assert go_on(plan_recovery(world(), lost(2), Policy())).experts_dropped == 2 * 2


def test_no_fault_is_the_same_members_in_a_new_domain() -> None:
    sequences = (view(1, 0), view(2, None))
    plan = go_on(plan_recovery(world(ONCE, sequences=sequences), [], Policy()))
    assert plan.membership == membership(ONCE, collocated(Epoch(5), 4))
    assert (plan.migrations, plan.masked, plan.experts_dropped) == ((), (), 0)
    assert "no rank is accused" in plan.reason


def test_the_dead_of_earlier_epochs_are_not_lost_again() -> None:
    topology = Topology(Epoch(7), (0, 2), (0, 2), (0, 2))
    left = TWICE.without(frozenset({RankId(1)}))
    plan = go_on(plan_recovery(world(left, topology=topology), lost(1), Policy()))
    assert plan.membership.topology == Topology(Epoch(8), (0, 2), (0, 2), (0, 2))
    assert plan.experts_dropped == 0


def test_masking_within_the_bound() -> None:
    policy = Policy(max_missing_fraction=0.25)
    plan = go_on(plan_recovery(world(ONCE), lost(1), policy))
    assert plan.masked == ((1, 1), (2, 1))
    assert plan.experts_dropped == 0
    assert "2 experts over 2 layers" in plan.reason
    assert "degraded" in plan.reason


def test_masking_beyond_the_bound() -> None:
    reason = give_up(plan_recovery(world(ONCE), lost(1), Policy(max_missing_fraction=0.24)))
    assert reason.startswith(
        "rank 1 lost: 2 experts have no replica left and there is no spare slot"
    )
    assert "25.0% of a layer's experts would be missing" in reason
    assert "--max-missing-fraction 24.0%" in reason
    assert "--redundant-experts" in reason


def test_the_bound_is_over_all_that_is_missing_by_now() -> None:
    """One expert is masked already; the second goes beyond what is allowed for both."""
    policy = Policy(max_missing_fraction=0.25)
    first = go_on(plan_recovery(world(ONCE), lost(1), policy))
    later = world(membership=first.membership)
    assert "50.0%" in give_up(plan_recovery(later, lost(2), policy))


def test_only_the_newly_missing_are_reported_as_masked() -> None:
    first = go_on(plan_recovery(world(ONCE), lost(1), ALL_MAY))
    later = world(membership=first.membership)
    assert go_on(plan_recovery(later, lost(2), ALL_MAY)).masked == ((1, 2), (2, 2))


def test_a_loss_that_is_covered_goes_on_although_experts_are_masked() -> None:
    degraded = held((0, 1), (0, 1), (2, 3), num_experts=5)
    plan = go_on(plan_recovery(world(degraded), lost(1), Policy(max_missing_fraction=0)))
    assert plan.membership.missing == ((1, 4), (2, 4)), "as before"
    assert plan.masked == ()
    assert plan.experts_dropped == 4


def test_a_small_layer_counts_by_itself() -> None:
    """Missing from one layer only: its fraction decides."""
    tables = {0: ((0, 1, 2), (0, 1, 2)), 1: ((3, -1, -1), (3, 2, -1))}
    two = world(placed(tables, 4))
    mask = replace(ALL_MAY, repair=("mask",))
    plan = go_on(plan_recovery(two, lost(0), mask))
    assert plan.masked == ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
    assert plan.experts_dropped == 1
    half = Policy(max_missing_fraction=0.5, repair=("mask",))
    assert "75.0%" in give_up(plan_recovery(two, lost(0), half))


def test_a_router_that_cannot_be_masked() -> None:
    reason = give_up(plan_recovery(world(ONCE, maskable=False), lost(1), ALL_MAY))
    assert "router cannot be masked" in reason
    go_on(plan_recovery(world(TWICE, maskable=False), lost(1), ALL_MAY))


@pytest.mark.parametrize(
    ("asked", "dead", "says"),
    [
        (world(), (0, 1, 2), "no attention rank is left (ranks 0, 1, 2 lost)"),
        (world(APART, TWO_AND_ONE), (0, 1), "no attention rank is left"),
        (world(held((), (0, 1, 2, 3)), ONE_EACH), (1,), "no expert rank is left (rank 1 lost)"),
    ],
)
def test_nobody_left(asked: World, dead: tuple[int, ...], says: str) -> None:
    assert says in give_up(plan_recovery(asked, lost(*dead), ALL_MAY))


def test_too_many_recoveries_in_vain_restart_everybody() -> None:
    policy = Policy(max_recoveries=3, window_s=60)
    go_on(plan_recovery(world(recent_recoveries=2), lost(1), policy))
    stuck = world(recent_recoveries=3, relaunchable=(RankId(1),))
    plan = plan_recovery(stuck, lost(1), policy)
    assert isinstance(plan, Restart)
    assert plan.ranks == (0, 1, 2)
    assert "3 recoveries in a row brought no step forward" in plan.reason


def test_where_a_restart_is_not_allowed_too_many_in_vain_are_the_end() -> None:
    policy = Policy(max_recoveries=3, repair=("reload", "mask"))
    assert "does not allow a restart" in give_up(
        plan_recovery(world(recent_recoveries=3), lost(1), policy)
    )


# ---- migrations -----------------------------------------------------------------------------


def test_homeless_sequences_go_oldest_first_to_the_least_loaded() -> None:
    sequences = (
        view(10, 1, 30, arrival=5),
        view(11, 1, 20, arrival=2),
        view(12, 0, 25, arrival=0),
        view(13, 1, 5, arrival=2),
    )
    plan = go_on(plan_recovery(world(sequences=sequences), lost(1), Policy()))
    assert plan.migrations == (
        Migration(SeqId(11), RankId(2), 20),  # 0: 25, 2: 0
        Migration(SeqId(13), RankId(2), 5),  # 0: 25, 2: 20
        Migration(SeqId(10), RankId(0), 30),  # 25 on both: the lower id
    )


def test_sequences_that_wait_are_the_routers_affair() -> None:
    plan = go_on(plan_recovery(world(sequences=(view(1, None), view(2, 0))), lost(1), Policy()))
    assert plan.migrations == ()


def test_sequences_go_to_attention_ranks_only() -> None:
    asked = world(APART, TWO_AND_ONE, sequences=(view(1, 0), view(2, 0)))
    plan = go_on(plan_recovery(asked, lost(0), Policy()))
    assert {m.to for m in plan.migrations} == {1}


def test_an_owner_that_left_in_an_earlier_epoch() -> None:
    """Compound faults: it was moved to a rank that has died since."""
    left = TWICE.without(frozenset({RankId(1)}))
    asked = world(left, sequences=(view(1, 1), view(2, 2)))
    plan = go_on(plan_recovery(asked, lost(2), ALL_MAY))
    assert plan.migrations == (Migration(SeqId(1), 0, 10), Migration(SeqId(2), 0, 10))


def test_the_plan_is_a_function_of_its_input() -> None:
    sequences = tuple(view(i, i % 3, 5 + i, arrival=i % 2) for i in range(9))
    asked = world(sequences=sequences)
    assert plan_recovery(asked, lost(1), Policy()) == plan_recovery(asked, lost(1), Policy())


# ---- reload ---------------------------------------------------------------------------------

SPARE = held((0, 1, -1), (2, -1, -1), (3, -1, -1))
"""Every expert once; room on each rank."""


def reload(rank: int, layer: int, slot: int, expert: int) -> Reload:
    return Reload(RankId(rank), LayerId(layer), SlotId(slot), ExpertId(expert))


def test_lost_experts_are_loaded_into_empty_slots() -> None:
    plan = go_on(plan_recovery(world(SPARE), lost(0), Policy()))
    assert plan.masked == ()
    assert plan.experts_dropped == 0
    assert plan.membership.missing == ()
    assert {(r.layer, r.expert) for r in plan.reloads} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert {r.rank for r in plan.reloads} == {1, 2}, "in parallel over the survivors"
    for r in plan.reloads:
        assert SPARE.slots[r.rank][LAYERS.index(r.layer)][r.slot] == -1
    assert "4 experts are loaded into free slots of 2 ranks" in plan.reason


def test_a_slot_whose_expert_has_another_replica_counts_as_spare() -> None:
    """0 and 1 are on two ranks; the loss of rank 2 takes the only 3."""
    placement = held((0, 1), (0, 1), (2, 3), (2, -1))
    three = world(placement.without(frozenset({RankId(3)})))
    plan = go_on(plan_recovery(three, lost(2), Policy()))
    assert plan.membership.missing == ()
    left = {e for r in (0, 1) for e in plan.membership.placement.slots[RankId(r)][0]}
    assert left == {0, 1, 2, 3}, "one replica of each of the others makes room"


def test_no_room_then_mask_within_the_bound() -> None:
    full = held((0, 1), (2, -1), (3, -1))
    plan = go_on(plan_recovery(world(full), lost(0), Policy(max_missing_fraction=0.5)))
    assert len(plan.reloads) == 4
    tight = held((0, 1, 2), (3, -1, -1))
    plan = go_on(plan_recovery(world(tight), lost(0), Policy(max_missing_fraction=0.25)))
    assert (len(plan.reloads), len(plan.masked)) == (4, 2), "two of three fit; the rest is masked"


def test_masked_meanwhile_if_the_policy_says_so() -> None:
    policy = Policy(max_missing_fraction=0.5, serve_masked_meanwhile=True)
    plan = go_on(plan_recovery(world(SPARE), lost(0), policy))
    assert plan.reloads == ()
    assert len(plan.background) == len(plan.masked) == 4
    assert set(plan.membership.missing) == set(plan.masked)
    assert "while they are loaded" in plan.reason
    strict = replace(policy, max_missing_fraction=0.25)
    assert go_on(plan_recovery(world(SPARE), lost(0), strict)).reloads, "beyond it: loaded first"


def test_the_order_is_the_policys() -> None:
    mask_first = Policy(max_missing_fraction=0.5, repair=("mask", "reload"))
    assert go_on(plan_recovery(world(SPARE), lost(0), mask_first)).reloads == ()
    never = Policy(max_missing_fraction=0.5, repair=("restart",))
    again = world(SPARE, relaunchable=(RankId(0),))
    assert isinstance(plan_recovery(again, lost(0), never), Restart)


def test_slots_that_are_being_loaded_into_are_taken() -> None:
    """Rank 1 loads expert 0 into its slot 1 beside the steps; the loss of 2 must not use that."""
    left = SPARE.without(frozenset({RankId(0)}))
    loading = tuple(reload(1, layer, 1, 0) for layer in LAYERS)
    now = world(left, loading=loading)
    plan = go_on(plan_recovery(now, lost(2), ALL_MAY))
    assert not {(r.layer, r.slot) for r in plan.reloads} & {(1, 1), (2, 1)}
    assert {r.expert for r in plan.reloads} <= {1, 3}, "0 is on its way"


def test_experts_loaded_meanwhile_are_taken_into_use() -> None:
    left = SPARE.without(frozenset({RankId(0)}))
    loaded = tuple(reload(1, layer, s, e) for layer in LAYERS for s, e in ((1, 0), (2, 1)))
    now = world(left, loaded=loaded)
    plan = go_on(plan_recovery(now, [], Policy()))
    assert plan.membership.missing == ()
    assert plan.reloads == plan.masked == ()


# ---- restart --------------------------------------------------------------------------------


def test_what_cannot_be_repaired_is_started_anew() -> None:
    again = world(ONCE, relaunchable=(RankId(1),), gone=(RankId(1),))
    plan = plan_recovery(again, lost(1), Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == (1,)
    assert "the streams wait" in plan.reason


def test_a_restarted_rank_is_taken_in_with_its_experts() -> None:
    home = collocated(Epoch(1), 4)
    back = world(
        ONCE, gone=(RankId(1),), ready=(RankId(1),), home=home, tables={RankId(1): ((1,), (1,))},
        sequences=(view(0, None), view(1, 0)),
    )  # fmt: skip
    plan = go_on(plan_recovery(back, [], Policy()))
    assert plan.membership == membership(ONCE, collocated(Epoch(5), 4))
    assert plan.migrations == (), "what has never had a rank waits for the router"


def test_while_a_rank_is_loading_the_plan_waits() -> None:
    waiting = world(ONCE, gone=(RankId(1),), launching=(RankId(1),))
    plan = plan_recovery(waiting, [], Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == ()


def test_the_last_resort_is_the_last() -> None:
    one, two = RankId(1), RankId(2)
    asked = {"gone": (one, two), "last_resort": (two,)}
    for others, expected in (
        ({"relaunchable": (one,)}, (one,)),
        ({"relaunchable": (one,), "launching": (one,)}, ()),
        ({}, (two,)),
    ):
        plan = plan_recovery(world(ONCE, **asked, **others), lost(1, 2), Policy())
        assert isinstance(plan, Restart)
        assert plan.ranks == expected
    in_vain = world(ONCE, **asked, recent_recoveries=6, relaunchable=(one,))
    plan = plan_recovery(in_vain, lost(1, 2), Policy(max_recoveries=6))
    assert isinstance(plan, Restart)
    assert plan.ranks == (0, 1, 3)


def test_all_ranks_at_once() -> None:
    everybody = tuple(RankId(r) for r in range(3))
    plan = plan_recovery(world(relaunchable=everybody), lost(0, 1, 2), Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == everybody


def test_restarts_have_a_limit() -> None:
    again = world(ONCE, relaunchable=(RankId(1),), recent_restarts=3)
    assert "3 restarts" in give_up(plan_recovery(again, lost(1), Policy(max_restarts=3)))


def test_domains_that_do_not_come_about_restart_everybody() -> None:
    stuck = world(domain_failures=DOMAIN_FAILURES)
    plan = plan_recovery(stuck, [], Policy())
    assert isinstance(plan, Restart)
    assert plan.ranks == (0, 1, 2)


def test_suspects_are_not_migrated() -> None:
    held = SequenceView(SeqId(0), None, 10, 0, orphan=True, held=True)
    free = SequenceView(SeqId(1), None, 10, 1, orphan=True)
    plan = go_on(plan_recovery(world(sequences=(held, free)), lost(1), Policy()))
    assert [m.seq_id for m in plan.migrations] == [1]
