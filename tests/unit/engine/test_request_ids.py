"""Which change an operator's request is answered by: the one that carries it out, and no other."""

from unit.control_plane import Instance
from unit.engine.test_engine_recovery import members, serving

from revivemoe.engine.operations import Operations
from revivemoe.epochs.rank_life import Condemned, Switching
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import ExpertsLoaded, Ready
from revivemoe.recovery.faults import DeviceReport
from revivemoe.recovery.policy import Policy

R1 = RankId(1)


def apply(instance: Instance, instruction: str, request_id: str, **params: int) -> None:
    Operations(instance.engine).apply(instruction, dict(params), request_id, instance.now)


def answers(instance: Instance) -> list[tuple[str, str | None]]:
    return [(record.cause, record.request_id) for record in instance.engine.epochs.records]


def say(instance: Instance, level: int) -> None:
    report = DeviceReport(R1, level, "xid-79", "fell off", "test")
    instance.engine.on_health(report, instance.now)
    instance.deliver()


def isolated() -> Instance:
    """Rank 1 is out; its process has not gone yet."""
    instance = serving(redundant=24, auto_rejoin=True)
    apply(instance, "isolate", "i1", id=1)
    instance.deliver()
    instance.wait(1)
    assert members(instance) == (0, 2, 3)
    return instance


def exit_of_rank_1(instance: Instance) -> None:
    incarnation = instance.engine.ranks[R1].incarnation
    instance.engine.on_exit(R1, incarnation, "exited", instance.now)
    instance.deliver()


def switching(**options: bool) -> Instance:
    """Rank 1 loads for the role of rank 4."""
    instance = Instance(3, redundant=8, expert_ranks=2, **options).start()
    instance.die(4)
    apply(instance, "role_switch", "s1", id=1)
    instance.wait(0.5)
    assert isinstance(instance.engine.ranks[R1].life, Switching)
    return instance


def test_a_switch_is_answered_when_it_begins_and_when_it_is_done() -> None:
    instance = switching()
    fake = instance.cluster.ranks[R1]
    fake.report(Ready(fake.rank, fake.incarnation, "cpu", 64, 0.5))
    instance.wait(1)
    assert answers(instance)[1:] == [("role_switch", "s1")] * 2
    instance.die(1)
    apply(instance, "rejoin", "j1", id=1)
    instance.wait(1)
    assert answers(instance)[-1] == ("rejoin", "j1")


def test_a_switch_that_came_to_nothing_is_not_answered_by_a_later_return() -> None:
    """It was said to have been carried out by it."""
    instance = switching(auto_rejoin=True)
    instance.die(1)
    instance.wait(30)
    assert members(instance) == (0, 1, 2, 3, 4)
    assert answers(instance)[1:] == [("role_switch", "s1"), ("rejoin", None), ("rejoin", None)]


def test_a_rejoin_that_a_device_forbids_is_not_answered_by_a_later_return() -> None:
    """Nor does what it has taken back, the operator's own isolate, keep the rank out for good."""
    instance = isolated()
    apply(instance, "rejoin", "j1", id=1)
    assert isinstance(instance.engine.ranks[R1].life, Condemned)
    say(instance, 6)
    exit_of_rank_1(instance)
    instance.wait(5)
    assert members(instance) == (0, 2, 3)
    say(instance, 0)
    instance.wait(20)
    assert members(instance) == (0, 1, 2, 3)
    assert answers(instance) == [("isolate", "i1"), ("rejoin", None)]


def test_nor_is_one_that_is_called_off() -> None:
    instance = isolated()
    apply(instance, "rejoin", "j1", id=1)
    apply(instance, "isolate", "i2", id=1)
    exit_of_rank_1(instance)
    instance.wait(5)
    assert members(instance) == (0, 2, 3)
    instance.engine.ranks[R1].vouch()
    instance.wait(20)
    assert answers(instance) == [("isolate", "i1"), ("rejoin", None)]


def test_nor_is_one_whose_process_dies() -> None:
    instance = isolated()
    launch = instance.cluster.launch
    instance.cluster.launch = lambda rank, incarnation, slots: None  # type: ignore[method-assign]
    apply(instance, "rejoin", "j1", id=1)
    exit_of_rank_1(instance)
    assert instance.engine.ranks[R1].incarnation == Incarnation(2)
    exit_of_rank_1(instance)
    instance.cluster.launch = launch  # type: ignore[method-assign]
    instance.wait(20)
    assert answers(instance) == [("isolate", "i1"), ("rejoin", None)]


def test_one_that_a_recovery_has_taken_in_is_over() -> None:
    instance = isolated()
    apply(instance, "rejoin", "j1", id=1)
    exit_of_rank_1(instance)
    instance.engine.epochs.redo("retry", instance.now, asked=True)
    instance.deliver()
    assert R1 in members(instance)
    instance.die(1)
    instance.wait(20)
    assert R1 in members(instance)
    assert "j1" not in [request for cause, request in answers(instance)[2:] if cause == "rejoin"]


def load(instance: Instance, error: str | None) -> None:
    """What is being loaded beside the steps comes to its end."""
    loads = instance.engine.epochs.loads
    assert loads.loading
    for request, loading in list(loads._under_way.items()):
        told = (loading.rank, Incarnation(1), request, 0.1, 1)
        instance.engine.on_report(ExpertsLoaded(*told, error=error), instance.now)
    instance.deliver()
    instance.wait(70)  # nobody who has refused is asked again before


def test_a_restore_that_came_to_nothing_is_not_answered_by_a_later_one() -> None:
    policy = Policy(repair=("mask",), max_missing_fraction=0.5, restore_redundancy=False)
    instance = serving(redundant=0, spare=8, policy=policy)
    instance.die(1)
    apply(instance, "restore_experts", "r1")
    load(instance, "no memory")
    instance.engine.epochs.loads.restore(instance.engine.membership, instance.now)
    load(instance, None)
    assert answers(instance)[1:] == [("restore_experts", None)]


def test_nor_is_one_that_was_answered() -> None:
    policy = Policy(repair=("mask",), max_missing_fraction=0.5, restore_redundancy=False)
    instance = serving(redundant=0, spare=8, policy=policy)
    for rank, ask in ((1, "r1"), (2, None)):
        instance.die(rank)
        if ask is None:
            instance.engine.epochs.loads.restore(instance.engine.membership, instance.now)
        else:
            apply(instance, "restore_experts", ask)
        load(instance, None)
    restored = [request for cause, request in answers(instance) if cause == "restore_experts"]
    assert restored == ["r1", None]
