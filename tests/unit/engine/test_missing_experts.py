"""Experts that are missing come back when they can, whoever could not load them before."""

from typing import Any

from unit.control_plane import Instance

from revivemoe.engine.operations import Operations
from revivemoe.ids import RankId
from revivemoe.messages.commands import LoadExperts
from revivemoe.messages.reports import ExpertsLoaded
from revivemoe.recovery.policy import Policy

NEVER = {"rejoin_after_s": 1e6, "rejoin_at_most_s": 1e6}
"""The lost rank itself does not come back here."""


def masking(auto: bool = True, redundant: int = 0, **policy: Any) -> Instance:
    """Two layers of eight experts on four ranks, three spare slots a rank. Masks at once."""
    given: dict[str, Any] = {"repair": ("mask", "reload", "restart"), "max_missing_fraction": 0.9}
    everything = Policy(**given | NEVER | policy)
    return Instance(4, redundant, everything, spare=3, auto_rejoin=auto).start()


def answer_loads(instance: Instance, fails: int | None = None) -> list[RankId]:
    """Every load asked for is answered. Returns who was asked; `fails` cannot load."""
    asked = [(r, c) for r, c in instance.cluster.sent if isinstance(c, LoadExperts)]
    instance.cluster.sent.clear()
    for rank, command in asked:
        error = "EIO" if rank == fails else None
        me = (rank, instance.engine.ranks[rank].incarnation)
        instance.engine.on_report(ExpertsLoaded(*me, command.request, 1.0, 1, error), instance.now)
    instance.deliver()
    return [rank for rank, _ in asked]


def missing(instance: Instance) -> int:
    return len(instance.engine.membership.missing)


def settle(instance: Instance, rounds: int = 10) -> None:
    for _ in range(rounds):
        instance.wait(1)
        answer_loads(instance)


def test_masked_experts_are_loaded_by_themselves() -> None:
    instance = masking()
    instance.die(1)
    assert missing(instance) > 0
    settle(instance)
    assert missing(instance) == 0


def test_what_could_not_be_loaded_a_moment_ago_is_tried_again_later() -> None:
    instance = masking(repair=("reload", "mask", "restart"))
    instance.cluster.hold_resumed = True
    instance.die(1)
    instance.cluster.hold_resumed = False
    me = (RankId(0), instance.engine.ranks[RankId(0)].incarnation)
    instance.engine.on_report(ExpertsLoaded(*me, 0, 0.0, 0, "EIO"), instance.now)
    instance.deliver()
    settle(instance)
    assert missing(instance) > 0, "loading has just failed"
    instance.wait(Policy().repeat_window_s)
    settle(instance)
    assert missing(instance) == 0


def test_missing_experts_come_before_second_replicas() -> None:
    instance = masking(redundant=4)
    for rank in (1, 2):
        instance.die(rank)
        instance.wait(0.2)
    settle(instance)
    assert missing(instance) == 0


def test_others_load_what_one_rank_could_not() -> None:
    instance = masking(auto=False, restore_redundancy=False)
    operations = Operations(instance.engine)
    instance.die(1)
    operations.apply("restore_experts", {}, "a", instance.now)
    refuses = next(r for r, c in instance.cluster.sent if isinstance(c, LoadExperts))
    answer_loads(instance, fails=refuses)
    instance.wait(1)
    assert missing(instance) > 0
    operations.apply("restore_experts", {}, "b", instance.now)
    asked = answer_loads(instance)
    instance.wait(1)
    assert asked
    assert refuses not in asked
    assert missing(instance) == 0


def test_a_slot_that_was_given_to_a_later_load_is_no_refusal() -> None:
    instance = masking(auto=False, restore_redundancy=False)
    loads, rank = instance.engine.epochs.loads, RankId(0)
    instance.die(1)
    loads.restore(instance.engine.membership, instance.now)
    me = (rank, instance.engine.ranks[rank].incarnation)
    for taken_over in (True, False):
        loads.on_loaded(ExpertsLoaded(*me, 99, 0.0, 0, "x", taken_over), instance.now)
    request = next(k for k, load in loads._under_way.items() if load.rank == rank)
    loads.on_loaded(ExpertsLoaded(*me, request, 0.0, 0, "taken", True), instance.now)
    assert rank not in loads.refusing(instance.now)


def test_what_failed_once_is_tried_again_in_the_same_epoch() -> None:
    instance = masking()
    instance.die(1)
    epoch = instance.engine.membership.epoch
    instance.wait(1)
    asked = [(r, c) for r, c in instance.cluster.sent if isinstance(c, LoadExperts)]
    instance.cluster.sent.clear()
    for rank, command in asked:
        me = (rank, instance.engine.ranks[rank].incarnation)
        failed = ExpertsLoaded(*me, command.request, 1.0, 0, "EIO")
        instance.engine.on_report(failed, instance.now)
    assert instance.engine.membership.epoch == epoch
    instance.wait(Policy().repeat_window_s + 1)
    settle(instance)
    assert missing(instance) == 0


def test_nothing_but_missing_experts_is_loaded_while_there_are_any() -> None:
    """With two ranks lost some experts are missing, and others have fewer replicas than before."""
    instance = masking(redundant=4)
    instance.die(1)
    settle(instance, 3)
    instance.die(2)
    lost = set(instance.engine.membership.missing)
    assert lost
    instance.wait(1)
    commands = [c for _, c in instance.cluster.sent if isinstance(c, LoadExperts)]
    wanted = {(load.layer, load.expert) for command in commands for load in command.loads}
    assert wanted
    assert wanted <= lost
