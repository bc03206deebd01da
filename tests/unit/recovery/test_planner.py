from typing import Any

import pytest

from revivemoe.ids import Epoch, LayerId, RankId, SeqId
from revivemoe.placement import ExpertPlacement
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.planner import (
    Continue,
    GiveUp,
    Migration,
    RecoveryPlan,
    SequenceView,
    World,
    plan_recovery,
)
from revivemoe.recovery.policy import Policy
from revivemoe.topology import Topology, collocated

LAYERS = (LayerId(1), LayerId(2))


def placed(*ranks: tuple[int, ...]) -> ExpertPlacement:
    """Four experts in two layers; what each rank holds of both, -1 for an empty slot."""
    slots = {RankId(r): (held, held) for r, held in enumerate(ranks)}
    return ExpertPlacement(num_experts=4, layers=LAYERS, slots=slots)


TWICE = placed((0, 1, 3), (1, 2, 0), (2, 3, -1))
"""Every expert on two ranks."""
ONCE = placed((0, 1), (2,), (3,))
ALL_MAY = Policy(max_missing_fraction=0.99)


def world(placement: ExpertPlacement = TWICE, **fields: Any) -> World:
    given: dict[str, Any] = {
        "topology": collocated(Epoch(4), 3),
        "placement": placement,
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
    assert plan.topology == Topology(Epoch(5), (0, 2), (0, 2), (0, 2))
    assert plan.placement.slots == {r: TWICE.slots[r] for r in (0, 2)}
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
    assert plan.topology == collocated(Epoch(5), 3)
    assert plan.placement == ONCE
    assert (plan.migrations, plan.masked, plan.experts_dropped) == ((), (), 0)
    assert "no rank is accused" in plan.reason


def test_the_dead_of_earlier_epochs_are_not_lost_again() -> None:
    topology = Topology(Epoch(7), (0, 2), (0, 2), (0, 2))
    left = TWICE.without(frozenset({RankId(1)}))
    plan = go_on(plan_recovery(world(left, topology=topology), lost(1), Policy()))
    assert plan.topology == Topology(Epoch(8), (0, 2), (0, 2), (0, 2))
    assert plan.experts_dropped == 0


def test_masking_within_the_bound() -> None:
    policy = Policy(max_missing_fraction=0.25)
    plan = go_on(plan_recovery(world(ONCE), lost(1), policy))
    assert plan.masked == ((1, 2), (2, 2))
    assert plan.experts_dropped == 0
    assert "2 experts over 2 layers" in plan.reason
    assert "degraded" in plan.reason


def test_masking_beyond_the_bound() -> None:
    reason = give_up(plan_recovery(world(ONCE), lost(1), Policy(max_missing_fraction=0.24)))
    assert reason.startswith("rank 1 lost: 25.0% of a layer's experts would be missing")
    assert "--max-missing-fraction 24.0%" in reason
    assert "--redundant-experts" in reason


def test_the_bound_is_over_all_that_is_missing_by_now() -> None:
    """One expert is masked already; the second goes beyond what is allowed for both."""
    policy = Policy(max_missing_fraction=0.25)
    first = go_on(plan_recovery(world(ONCE), lost(1), policy))
    later = world(first.placement, topology=first.topology)
    assert "50.0%" in give_up(plan_recovery(later, lost(2), policy))


def test_only_the_newly_missing_are_reported_as_masked() -> None:
    first = go_on(plan_recovery(world(ONCE), lost(1), ALL_MAY))
    later = world(first.placement, topology=first.topology)
    assert go_on(plan_recovery(later, lost(2), ALL_MAY)).masked == ((1, 3), (2, 3))


def test_a_loss_that_is_covered_goes_on_although_experts_are_masked() -> None:
    degraded = placed((0, 1), (0, 1), (2,))
    plan = go_on(plan_recovery(world(degraded), lost(1), Policy(max_missing_fraction=0)))
    assert plan.masked == ()
    assert plan.experts_dropped == 4


def test_a_small_layer_counts_by_itself() -> None:
    """Missing from one layer only: its fraction decides."""
    slots = {RankId(0): ((0, 1, 2), (0, 1, 2)), RankId(1): ((3, -1, -1), (3, 2, -1))}
    placement = ExpertPlacement(num_experts=4, layers=LAYERS, slots=slots)
    topology = collocated(Epoch(1), 2)
    plan = go_on(plan_recovery(world(placement, topology=topology), lost(0), ALL_MAY))
    assert plan.masked == ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
    assert plan.experts_dropped == 1
    half = Policy(max_missing_fraction=0.5)
    assert "75.0%" in give_up(plan_recovery(world(placement, topology=topology), lost(0), half))


def test_a_router_that_cannot_be_masked() -> None:
    reason = give_up(plan_recovery(world(ONCE, maskable=False), lost(1), ALL_MAY))
    assert "router cannot be masked" in reason
    go_on(plan_recovery(world(TWICE, maskable=False), lost(1), ALL_MAY))


@pytest.mark.parametrize(
    ("topology", "dead", "says"),
    [
        (collocated(Epoch(1), 3), (0, 1, 2), "no attention rank is left (ranks 0, 1, 2 lost)"),
        (Topology(Epoch(1), (0, 1, 2), (0, 1), (2,)), (0, 1), "no attention rank is left"),
        (Topology(Epoch(1), (0, 1, 2), (0, 1), (2,)), (2,), "no expert rank is left (rank 2 lost)"),
    ],
)
def test_nobody_left(topology: Topology, dead: tuple[int, ...], says: str) -> None:
    assert says in give_up(plan_recovery(world(topology=topology), lost(*dead), ALL_MAY))


def test_too_many_recoveries_in_the_window() -> None:
    policy = Policy(max_recoveries=3, window_s=60)
    go_on(plan_recovery(world(recent_recoveries=2), lost(1), policy))
    reason = give_up(plan_recovery(world(recent_recoveries=3), lost(1), policy))
    assert reason == "3 recoveries within 60 s have reached the policy's limit of 3"


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
    topology = Topology(Epoch(1), (0, 1, 2), (0, 1), (2,))
    placement = placed((), (), (0, 1, 2, 3))
    asked = world(placement, topology=topology, sequences=(view(1, 0), view(2, 0)))
    plan = go_on(plan_recovery(asked, lost(0), Policy()))
    assert {m.to for m in plan.migrations} == {1}


def test_an_owner_that_left_in_an_earlier_epoch() -> None:
    """Compound faults: it was moved to a rank that has died since."""
    topology = Topology(Epoch(9), (0, 2), (0, 2), (0, 2))
    asked = world(topology=topology, sequences=(view(1, 1), view(2, 2)))
    plan = go_on(plan_recovery(asked, lost(2), ALL_MAY))
    assert plan.migrations == (Migration(SeqId(1), 0, 10), Migration(SeqId(2), 0, 10))


def test_the_plan_is_a_function_of_its_input() -> None:
    sequences = tuple(view(i, i % 3, 5 + i, arrival=i % 2) for i in range(9))
    asked = world(sequences=sequences)
    assert plan_recovery(asked, lost(1), Policy()) == plan_recovery(asked, lost(1), Policy())
