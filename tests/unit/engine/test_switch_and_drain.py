"""Ranks that are to go for more than one reason, or while on their way to another role."""

from collections.abc import Callable

import pytest
from unit.control_plane import Instance, Sink
from unit.engine.test_engine_recovery import assert_whole, loaded, members

from revivemoe.engine.operations import Operations
from revivemoe.epochs.rank_life import Switching
from revivemoe.epochs.state import Recovering
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Ready
from revivemoe.recovery.faults import DeviceReport, Fault, FaultKind

R0, R1 = RankId(0), RankId(1)


def switching(begun: bool, auto_rejoin: bool = False) -> tuple[Instance, list[Sink]]:
    """Of three attention and two expert ranks one of the latter is gone, and rank 1 is to take its
    place. `begun`: its sequences are on their way; otherwise it waits for another rank to go.
    """
    instance = Instance(3, redundant=8, expert_ranks=2, auto_rejoin=auto_rejoin).start()
    instance.die(4)
    sinks = loaded(instance, 60)
    instance.step(2)
    if not begun:
        instance.engine.maintenance.drain(Fault(R0, "slow", "too slow"), instance.now)
    Operations(instance.engine).apply("role_switch", {"id": 1}, "s1", instance.now)
    assert instance.engine.ranks[R1].draining == begun
    return instance, sinks


def by_operator(instance: Instance) -> None:
    Operations(instance.engine).apply("isolate", {"id": 1}, "r1", instance.now)


def by_device(instance: Instance) -> None:
    instance.engine.on_health(DeviceReport(R1, 4, "ecc", "errors", "test"), instance.now)


def by_slowness(instance: Instance) -> None:
    instance.engine.maintenance.drain(Fault(R1, "slow", "too slow"), instance.now)


CAUSES = {by_operator: "isolate", by_device: "device_fault", by_slowness: "slow"}


def pass_time(instance: Instance) -> None:
    for _ in range(60):
        instance.step()
        instance.wait(0.1)


@pytest.mark.parametrize("begun", [False, True], ids=["waits", "begun"])
@pytest.mark.parametrize("take_out", CAUSES)
def test_who_is_to_go_does_not_change_its_role_first(
    take_out: Callable[[Instance], None], begun: bool
) -> None:
    """It was said to be applied, and the rank switched, and stayed for good."""
    instance, sinks = switching(begun)
    take_out(instance)
    pass_time(instance)
    assert_whole(sinks, 60)
    assert not instance.named("role_switch")
    assert R1 not in members(instance)
    last = instance.engine.epochs.records[-1]
    cause = CAUSES[take_out]
    assert (last.cause, last.request_id) == (cause, "r1" if cause == "isolate" else None)
    (event,) = instance.named("drain_refused")
    assert (event["id"], event["request_id"]) == (1, "s1")
    assert f"it is to leave ({cause}: " in event["reason"]
    assert not instance.engine.epochs.fleet.trusted(instance.engine.ranks[R1])


def test_a_later_return_is_no_answer_to_the_switch() -> None:
    instance, _ = switching(begun=True, auto_rejoin=True)
    by_device(instance)
    pass_time(instance)
    assert R1 not in members(instance)
    instance.engine.on_exit(R1, Incarnation(1), "exited", instance.now)
    instance.engine.on_health(DeviceReport(R1, 0, "ecc", "", "test"), instance.now)
    pass_time(instance)
    assert R1 in members(instance)
    assert "s1" not in [record.request_id for record in instance.engine.epochs.records]


def test_who_changes_its_role_at_this_moment_goes_after_that() -> None:
    """The switch was said to be refused, and came about; and nobody wanted the rank out any more,
    slow as it was.
    """
    instance = Instance(3, redundant=8, expert_ranks=2).start()
    instance.die(4)
    Operations(instance.engine).apply("role_switch", {"id": 1}, "s1", instance.now)
    assert isinstance(instance.engine.state, Recovering)
    by_slowness(instance)
    instance.deliver()
    instance.wait(1)
    assert isinstance(instance.engine.ranks[R1].life, Switching)
    assert not instance.named("drain_refused")
    fake = instance.cluster.ranks[R1]
    fake.report(Ready(fake.rank, fake.incarnation, "cpu", 64, 0.5))
    instance.wait(1)
    causes = [(r.cause, r.request_id) for r in instance.engine.epochs.records]
    assert causes[1:] == [("role_switch", "s1"), ("role_switch", "s1"), ("slow", None)]
    assert R1 not in members(instance)


@pytest.mark.parametrize("begun", [False, True], ids=["waits", "begun"])
@pytest.mark.parametrize("kind", ["slow", "going_home", "device_fault"])
def test_an_operator_who_wants_it_out_as_well_is_answered(kind: FaultKind, begun: bool) -> None:
    """No event and no record named his request; and who goes home comes back at once."""
    instance = Instance(4, redundant=24, auto_rejoin=True).start()
    sinks = loaded(instance, 60)
    instance.step(2)
    if not begun:
        instance.engine.maintenance.drain(Fault(R0, "slow", "too slow"), instance.now)
    instance.engine.maintenance.drain(Fault(R1, kind, "not needed"), instance.now)
    assert instance.engine.ranks[R1].draining == begun
    by_operator(instance)
    pass_time(instance)
    instance.engine.on_exit(R1, Incarnation(1), "exited", instance.now)
    pass_time(instance)
    assert_whole(sinks, 60)
    assert R1 not in members(instance)
    last = instance.engine.epochs.records[-1]
    assert (last.cause, last.request_id) == ("isolate", "r1")
