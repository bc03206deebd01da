"""Ranks on their way back that are not to come: what waited for them is planned anew."""

from collections.abc import Callable

import pytest
from unit.control_plane import Instance
from unit.engine.test_engine_recovery import loaded, members, serving

from revivemoe.engine.operations import Operations
from revivemoe.epochs.rank_life import Condemned, Gone, Queued
from revivemoe.epochs.state import FailedState, Recovering, Serving
from revivemoe.ids import Incarnation, RankId
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.policy import Policy

R1, R2 = RankId(1), RankId(2)
ALL = (0, 1, 2, 3)


def by_operator(instance: Instance) -> None:
    Operations(instance.engine).apply("isolate", {"id": 1}, "r1", instance.now)


def by_device(instance: Instance) -> None:
    instance.engine.on_health(DeviceReport(R1, 6, "xid79", "fell off", "test"), instance.now)


BOTH = pytest.mark.parametrize("call_off", [by_operator, by_device])


def after_refusals(times: int, policy: Policy | None = None) -> Instance:
    """Nobody can do without rank 1: it dies, and its next processes never come into being."""
    instance = serving(redundant=0, policy=policy)
    loaded(instance)
    instance.step(2)
    launch = instance.cluster.launch
    instance.cluster.launch = lambda rank, incarnation, slots: None  # type: ignore[method-assign]
    instance.die(1)
    for incarnation in range(2, 2 + times):
        while instance.engine.ranks[R1].incarnation < incarnation:
            instance.wait(0.1)
        instance.engine.on_exit(R1, Incarnation(incarnation), "refused", instance.now)
        instance.deliver()
    instance.cluster.launch = launch  # type: ignore[method-assign]
    return instance


def assert_back(instance: Instance) -> None:
    """On its own device again: there is no other one."""
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == ALL
    assert not instance.named("unkillable")


@BOTH
def test_a_restart_that_waits_its_turn_is_planned_anew(
    call_off: Callable[[Instance], None],
) -> None:
    """An operator's word took its turn away and left it owed: all waited for two minutes."""
    instance = after_refusals(1)
    assert isinstance(instance.engine.ranks[R1].life, Queued)
    call_off(instance)
    assert isinstance(instance.engine.state, Recovering)
    instance.wait(2.1)
    assert_back(instance)


def test_an_accusation_leaves_no_process_owed_that_nobody_would_start() -> None:
    instance = after_refusals(1)
    fleet = instance.engine.epochs.fleet
    fleet.condemn(Fault(R1, "slow", "too slow"), instance.now)
    assert isinstance(instance.engine.ranks[R1].life, Gone)
    assert fleet.launching == []


@BOTH
def test_who_is_called_off_again_and_again_waits_no_longer(
    call_off: Callable[[Instance], None],
) -> None:
    instance = after_refusals(1)
    began = instance.now
    while not isinstance(instance.engine.state, Serving):
        assert instance.now < began + 3
        call_off(instance)
        instance.wait(0.5)
    assert_back(instance)


@BOTH
def test_the_last_restart_allowed_is_not_given_up_for_being_planned_anew(
    call_off: Callable[[Instance], None],
) -> None:
    """It counted against itself: an instance ended that had one restart left, and was in it."""
    instance = after_refusals(2, Policy(max_restarts=3))
    call_off(instance)
    instance.wait(4.1)
    assert_back(instance)


@BOTH
def test_nor_is_the_first_while_the_corpse_is_awaited(
    call_off: Callable[[Instance], None],
) -> None:
    instance = serving(redundant=0, policy=Policy(max_restarts=1))
    instance.engine.epochs.accuse([Fault(R1, "hang", "no progress")], instance.now)
    instance.deliver()
    assert isinstance(instance.engine.ranks[R1].life, Condemned)
    call_off(instance)
    instance.engine.on_exit(R1, Incarnation(1), "killed", instance.now)
    instance.wait(1)
    assert_back(instance)


@pytest.mark.parametrize("called_off", [False, True])
def test_restarts_in_vain_are_counted_as_before(called_off: bool) -> None:
    instance = after_refusals(2, Policy(max_restarts=3))
    if called_off:
        by_operator(instance)
    instance.cluster.launch = lambda rank, incarnation, slots: None  # type: ignore[method-assign]
    instance.wait(4.1)
    instance.engine.on_exit(R1, Incarnation(4), "refused", instance.now)
    instance.deliver()
    assert isinstance(instance.engine.state, FailedState)
    assert "3 restarts in a row" in instance.engine.state.reason


def say_of(instance: Instance, *ranks: RankId) -> None:
    """One signal of a device that all of them share."""
    for rank in ranks:
        report = DeviceReport(rank, 6, "gpu-lost", "fell off", "test", ranks)
        instance.engine.on_health(report, instance.now)
    instance.deliver()


def one_loads_and_one_is_a_corpse(policy: Policy) -> Instance:
    """Both are awaited: rank 1 has not gone yet, and the next process of rank 2 is there."""
    instance = serving(redundant=0, policy=policy)
    hung = [Fault(rank, "hang", "no progress") for rank in (R1, R2)]
    instance.engine.epochs.accuse(hung, instance.now)
    instance.deliver()
    instance.cluster.launch = lambda rank, incarnation, slots: None  # type: ignore[method-assign]
    instance.engine.on_exit(R2, Incarnation(1), "killed", instance.now)
    assert isinstance(instance.engine.ranks[R1].life, Condemned)
    assert instance.engine.ranks[R2].loading
    return instance


def test_ranks_of_one_signal_are_planned_for_together() -> None:
    """One was planned for as if the other, named in the same breath, were still to come."""
    instance = one_loads_and_one_is_a_corpse(Policy())
    say_of(instance, R1, R2)
    assert [event["ranks"] for event in instance.named("restart")] == [[1, 2], [1, 2]]
    assert isinstance(instance.engine.state, Recovering)


def test_a_signal_that_ends_the_instance_ends_it_once() -> None:
    """It was to be planned for without the one, which ended it, and then to recover once more."""
    instance = one_loads_and_one_is_a_corpse(Policy(max_restarts=1))
    say_of(instance, R1, R2)
    assert isinstance(instance.engine.state, FailedState)
    assert len(instance.named("failed")) == 1
