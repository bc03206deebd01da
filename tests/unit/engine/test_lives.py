"""Processes that come late, go late, or not at all; and what repeats."""

from unit.control_plane import Instance
from unit.engine.test_engine_recovery import assert_whole, loaded, members, serving

from revivemoe.epochs.rank_life import Condemned, Gone, Queued
from revivemoe.epochs.state import FailedState, Recovering, Serving
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.reports import Resumed
from revivemoe.recovery.faults import DeviceReport
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
