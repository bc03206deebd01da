"""Ranks on their way back that are not to come: what waited for them is planned anew."""

from collections.abc import Callable

import pytest
from unit.control_plane import Instance
from unit.engine.test_engine_recovery import loaded, members, serving

from revivemoe.engine.operations import Operations
from revivemoe.epochs.rank_life import Gone, Queued
from revivemoe.epochs.state import Recovering, Serving
from revivemoe.ids import Incarnation, RankId
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.policy import Policy

R1 = RankId(1)
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
