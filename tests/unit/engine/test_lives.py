"""Processes that come late, go late, or not at all; and what repeats."""

import pytest
from unit.control_plane import Instance
from unit.engine.test_engine_recovery import assert_whole, loaded, members, serving

from revivemoe.engine.operations import Operations
from revivemoe.epochs.rank_life import Condemned, Gone, Queued, Switching
from revivemoe.epochs.state import FailedState, Recovering, Serving
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.reports import Resumed
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.policy import Policy


def test_a_device_that_asks_for_retries_again_and_again_is_drained() -> None:
    """Nine reports of one flapping link ended an instance; now its device goes, and only that."""
    instance = serving(policy=Policy(max_retries=3))
    sinks = loaded(instance, 60)
    for _ in range(9):
        report = DeviceReport(RankId(2), 3, "link", "flaps", "test")
        instance.engine.on_health(report, instance.now)
        instance.deliver()
        instance.step(2)
        instance.wait(0.2)
    assert members(instance) == (0, 1, 3)
    causes = [record.cause for record in instance.engine.epochs.records]
    assert causes == ["device_fault"] * 4
    instance.step(60)
    assert_whole(sinks, 60)


def test_a_failed_instance_stays_so_whatever_comes_later() -> None:
    """C4: a late `Resumed` brought one back to life once, with dead ranks."""
    instance = Instance(2, redundant=0, policy=Policy(repair=())).start()
    fake = instance.cluster.ranks[RankId(1)]
    instance.die(0)
    assert isinstance(instance.engine.state, FailedState)
    for epoch in (1, 2, 3):
        late = Resumed(fake.rank, fake.incarnation, Epoch(epoch), 0, 0.0)
        instance.engine.on_report(late, instance.now)
    instance.engine.on_exit(fake.rank, fake.incarnation, "gone", instance.now)
    instance.wait(5)
    assert isinstance(instance.engine.state, FailedState)
    assert not instance.named("launch")


def test_a_process_that_comes_after_its_sentence_is_killed_on_arrival() -> None:
    """C3, as the engine sees it: launched late, given up, and there after all."""
    instance = serving(redundant=24, auto_rejoin=True)
    launched: list[RankId] = []
    instance.cluster.launch = lambda rank, incarnation, slots: launched.append(rank)  # type: ignore[method-assign]
    instance.die(1)
    instance.wait(3)
    assert launched == [1]
    instance.wait(61)
    view = instance.engine.ranks[RankId(1)]
    assert isinstance(view.life, Condemned)
    assert not view.life.arrived
    before = instance.cluster.killed.count(RankId(1))
    instance.engine.on_arrived(RankId(1), view.incarnation, 4711, instance.now)
    assert instance.cluster.killed.count(RankId(1)) == before + 1
    instance.engine.on_exit(RankId(1), view.incarnation, "killed", instance.now)
    assert isinstance(view.life, Gone | Queued)
    instance.wait(10)
    assert launched == [1, 1], "and its rank comes back"


def test_a_corpse_is_awaited_and_its_rank_launched_when_it_goes() -> None:
    """C1: where the plan needs the rank, for as long as the policy says."""
    instance = serving(redundant=0, policy=Policy(corpse_timeout_s=120))
    sinks = loaded(instance)
    instance.step(2)
    instance.cluster.ranks[RankId(1)].mute = True
    instance.wait(1.6)
    instance.wait(100)
    assert isinstance(instance.engine.state, Recovering), "the streams wait"
    instance.engine.on_exit(RankId(1), Incarnation(1), "killed at last", instance.now)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == (0, 1, 2, 3)
    instance.step(20)
    assert_whole(sinks)


def test_a_donor_that_exits_while_it_switches_is_taken_over_from() -> None:
    """However it went: an exit by pidfd was not seen as the loss of a switch once."""
    for silent in (False, True):
        instance = Instance(4, 24, auto_rejoin=False).start()
        epochs = instance.engine.epochs
        view = instance.engine.ranks[RankId(0)]
        epochs.fleet.switched[RankId(0)] = None
        view.life = Switching(instance.now, instance.now + 600)
        if silent:
            epochs.accuse([Fault(RankId(0), "heartbeat", "silent")], instance.now)
        else:
            instance.die(0)
        assert epochs.lost_switch


def test_what_a_device_said_outlives_the_process() -> None:
    """The exit comes first, the monitor's word a moment later: the rank is not started there."""
    instance = serving(redundant=24, auto_rejoin=True)
    instance.die(1)
    instance.wait(0.1)
    instance.engine.on_health(DeviceReport(RankId(1), 6, "xid79", "fell off", "test"), instance.now)
    instance.wait(120)
    assert members(instance) == (0, 2, 3)
    assert not instance.named("launch")
    instance.engine.on_health(DeviceReport(RankId(1), 0, "xid79", "", "test"), instance.now)
    instance.wait(10)
    assert members(instance) == (0, 1, 2, 3), "taken back: it may return"


def test_a_rank_on_its_way_back_can_be_called_off() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    instance.die(1)
    instance.wait(0.1)
    assert isinstance(instance.engine.ranks[RankId(1)].life, Queued)
    Operations(instance.engine).apply("isolate", {"id": 1}, "r", instance.now)
    instance.wait(120)
    assert not instance.named("launch")
    Operations(instance.engine).apply("rejoin", {"id": 1}, "again", instance.now)
    instance.deliver()
    instance.wait(1)
    assert members(instance) == (0, 1, 2, 3)


def test_an_operators_word_outlives_a_death_on_the_way_out() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    loaded(instance, 40)
    instance.step(2)
    Operations(instance.engine).apply("isolate", {"id": 1}, "r", instance.now)
    instance.die(1)
    instance.wait(60)
    assert members(instance) == (0, 2, 3)
    assert not instance.named("launch")


def test_restarts_that_bring_nothing_come_ever_later() -> None:
    """Three refused launches ended an instance within milliseconds once."""
    instance = serving(redundant=0, auto_rejoin=False)
    loaded(instance)
    instance.step(2)
    instance.cluster.launch = lambda rank, incarnation, slots: None  # type: ignore[method-assign]
    instance.die(1)
    for incarnation in (2, 3):
        instance.engine.on_exit(RankId(1), Incarnation(incarnation), "refused", instance.now)
        assert isinstance(instance.engine.state, Recovering)
        instance.wait(1.9 if incarnation == 2 else 3.9)
        assert instance.engine.ranks[RankId(1)].incarnation == incarnation, "not yet"
        instance.wait(0.3)
        assert instance.engine.ranks[RankId(1)].incarnation == incarnation + 1


def test_nothing_is_launched_by_the_end() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    instance.die(1)
    instance.wait(0.1)
    instance.cluster.ranks[RankId(2)].mute = True
    instance.wait(1.5)
    instance.engine.maintenance.rejoin(RankId(2), instance.now, None)
    instance.engine.stop()
    instance.engine.on_exit(RankId(2), Incarnation(1), "killed", instance.now)
    instance.wait(30)
    assert not instance.named("launch")


def test_nobody_is_taken_out_before_the_first_epoch() -> None:
    instance = Instance(4, 24)
    instance.engine.start(instance.now)
    with pytest.raises(ValueError, match="starting"):
        Operations(instance.engine).apply("isolate", {"id": 1}, "r", instance.now)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)


def test_a_joiner_that_the_change_under_way_counts_on_can_be_taken_out() -> None:
    """It left in good order once, under a change that went on to take it in."""
    instance = serving(redundant=24, auto_rejoin=True)
    sinks = loaded(instance, 30)
    instance.step(2)
    instance.die(1)
    instance.cluster.hold_resumed = True
    instance.wait(3)
    assert isinstance(instance.engine.state, Recovering)
    instance.cluster.hold_resumed = False
    Operations(instance.engine).apply("isolate", {"id": 1}, "r", instance.now)
    instance.deliver()
    instance.wait(1)
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == (0, 2, 3)
    instance.step(40)
    assert_whole(sinks, 30)


def test_a_recovery_that_the_end_comes_into_launches_nothing_later() -> None:
    instance = serving(redundant=0, auto_rejoin=False)
    instance.cluster.ranks[RankId(2)].stubborn = True
    instance.die(1)
    assert isinstance(instance.engine.state, Recovering), "one has not answered the fence"
    instance.engine.stop()
    instance.wait(60)
    assert not instance.named("launch")


def test_one_code_taken_back_leaves_what_another_says() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    for code in ("xid79", "xid48"):
        report = DeviceReport(RankId(1), 6, code, "broken", "test")
        instance.engine.on_health(report, instance.now)
        instance.deliver()
    instance.engine.on_exit(RankId(1), Incarnation(1), "killed", instance.now)
    instance.engine.on_health(DeviceReport(RankId(1), 0, "xid79", "", "test"), instance.now)
    instance.wait(60)
    assert members(instance) == (0, 2, 3)
    instance.engine.on_health(DeviceReport(RankId(1), 0, "xid48", "", "test"), instance.now)
    instance.wait(10)
    assert members(instance) == (0, 1, 2, 3)


def test_a_rank_that_dies_while_its_device_drains_it_is_not_started_there() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    loaded(instance, 40)
    instance.step(2)
    instance.engine.on_health(DeviceReport(RankId(1), 4, "ecc", "errors", "test"), instance.now)
    instance.die(1)
    instance.wait(60)
    assert members(instance) == (0, 2, 3)
    assert not instance.named("launch")


@pytest.mark.parametrize("level", [4, 6])
def test_an_operators_rejoin_overrules_what_the_device_said_before(level: int) -> None:
    """A soak: a rank asked back after a device fault was not started again at its next death."""
    instance = serving(redundant=24, auto_rejoin=True)
    report = DeviceReport(RankId(1), level, "ecc", "errors", "test")
    instance.engine.on_health(report, instance.now)
    instance.deliver()
    instance.engine.on_exit(RankId(1), Incarnation(1), "killed", instance.now)
    instance.wait(30)
    assert members(instance) == (0, 2, 3)
    Operations(instance.engine).apply("rejoin", {"id": 1}, "mended", instance.now)
    instance.deliver()
    instance.wait(1)
    assert members(instance) == (0, 1, 2, 3)
    instance.die(1)
    instance.wait(10)
    assert members(instance) == (0, 1, 2, 3)
