"""Ranks that are out for their devices' sake, or an operator's: started only if nobody else is."""

from collections.abc import Callable

import pytest
from unit.control_plane import Instance
from unit.engine.test_engine_recovery import members

from revivemoe.engine.operations import Operations
from revivemoe.epochs.state import Recovering, Serving
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Ready, Report
from revivemoe.recovery.faults import DeviceReport

R1, R2, R3, R5 = (RankId(rank) for rank in (1, 2, 3, 5))


def by_operator(instance: Instance) -> None:
    Operations(instance.engine).apply("isolate", {"id": 1}, "i1", instance.now)


def by_device(instance: Instance) -> None:
    instance.engine.on_health(DeviceReport(R1, 6, "xid-79", "fell off", "test"), instance.now)


BOTH = pytest.mark.parametrize("take_out", [by_operator, by_device])


def without_rank_1(take_out: Callable[[Instance], None]) -> Instance:
    """Of six ranks; the others have all experts."""
    instance = Instance(num_ranks=6, redundant=4, auto_rejoin=True).start()
    take_out(instance)
    instance.deliver()
    instance.wait(1)
    instance.engine.on_exit(R1, Incarnation(1), "exited", instance.now)
    instance.wait(1)
    assert members(instance) == (0, 2, 3, 4, 5)
    return instance


def load_slowly(instance: Instance, *slow: RankId) -> list[Report]:
    """What these ranks' next processes say when they have loaded is kept back."""
    launch, late = instance.cluster.launch, list[Report]()

    def launch_slowly(rank: RankId, incarnation: Incarnation, slots: object) -> None:
        launch(rank, incarnation, slots)  # type: ignore[arg-type]
        if rank in slow:
            ready = instance.cluster.reports.pop()
            assert isinstance(ready, Ready)
            late.append(ready)

    instance.cluster.launch = launch_slowly  # type: ignore[method-assign, assignment]
    return late


def started(instance: Instance) -> list[list[int]]:
    return [event["ranks"] for event in instance.named("restart")]


def lose(instance: Instance, *ranks: RankId) -> None:
    for rank in ranks:
        instance.die(rank, deliver=False)
    instance.deliver()


@BOTH
def test_who_is_on_the_way_comes_first(take_out: Callable[[Instance], None]) -> None:
    """Each plan that was made while trusted ranks were loading found none that was dead, and took
    to the others: rank 1 came back on a lost GPU, or died there until the instance was given up.
    """
    instance = without_rank_1(take_out)
    late = load_slowly(instance, R3, R5)
    lose(instance, R2, R3, R5)
    instance.wait(0.5)
    assert isinstance(instance.engine.state, Recovering)
    assert started(instance) == [[2, 3, 5]]
    for ready in late:
        instance.engine.on_report(ready, instance.now)
    instance.deliver()
    instance.wait(30)
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == (0, 2, 3, 4, 5)
    assert instance.engine.ranks[R1].incarnation == 1


@BOTH
def test_whoever_is_struck_meanwhile_waits_its_turn(take_out: Callable[[Instance], None]) -> None:
    """A plan was made anew for that, too."""
    instance = without_rank_1(take_out)
    load_slowly(instance, R2, R3)
    lose(instance, R2, R3, R5)
    hurt = DeviceReport(R3, 6, "xid-79", "fell off", "test")
    instance.engine.on_health(hurt, instance.now)
    instance.deliver()
    instance.wait(0.5)
    assert started(instance) == [[2, 3, 5]]


@BOTH
def test_its_turn_comes_when_nobody_else_is_left(take_out: Callable[[Instance], None]) -> None:
    instance = without_rank_1(take_out)
    load_slowly(instance, R2, R3, R5)
    lost = (R2, R3, R5)
    lose(instance, *lost)
    for rank in lost:
        report = DeviceReport(rank, 6, "gpu-lost", "fell off", "test", lost)
        instance.engine.on_health(report, instance.now)
    instance.deliver()
    assert started(instance) == [[2, 3, 5], [1, 2, 3, 5]]


@BOTH
def test_a_restart_of_all_is_none_of_those_who_are_out(
    take_out: Callable[[Instance], None],
) -> None:
    """Recoveries in vain are no reason to trust a lost GPU."""
    instance = without_rank_1(take_out)
    instance.engine.epochs.attempts.domain_failures = 3
    instance.engine.epochs.redo("communication", instance.now)
    instance.deliver()
    assert started(instance) == [[0, 2, 3, 4, 5]]
    for rank in (0, 2, 3, 4, 5):
        instance.engine.on_exit(RankId(rank), Incarnation(1), "killed", instance.now)
    instance.deliver()
    instance.wait(10)
    assert members(instance) == (0, 2, 3, 4, 5)
