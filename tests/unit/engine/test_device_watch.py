"""What monitors say: code by code, before the start, and of several ranks at once."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from unit.control_plane import Instance
from unit.engine.test_engine_recovery import assert_whole, loaded, members, serving

from revivemoe.engine.metrics import render_metrics
from revivemoe.engine.operations import Operations
from revivemoe.engine.status import status_document
from revivemoe.epochs.rank_life import Condemned
from revivemoe.epochs.state import Serving
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.commands import Add, Fence
from revivemoe.recovery.faults import DeviceReport, Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.policy import Policy

R0, R1, R2, R3 = (RankId(rank) for rank in range(4))
ALL = (R0, R1, R2, R3)
MASK = Policy(repair=("mask",))
"""What has no replica left cannot be had again."""


def say(instance: Instance, level: int, code: str = "ecc", rank: RankId = R1) -> None:
    report = DeviceReport(rank, level, code, "as a monitor says", "test")
    instance.engine.on_health(report, instance.now)
    instance.deliver()


def say_of_all(
    instance: Instance, level: int, ranks: Iterable[RankId] = ALL, code: str = "taint"
) -> None:
    """One signal, as a source tells it: a report for each rank."""
    told = tuple(ranks)
    shared = told if len(told) > 1 else ()
    for rank in told:
        report = DeviceReport(rank, level, code, "as a monitor says", "test", shared)
        instance.engine.on_health(report, instance.now)
    instance.deliver()


def fault_of(instance: Instance, rank: RankId = R1) -> tuple[str, int] | None:
    fault = instance.engine.ranks[rank].fault
    return None if fault is None else (fault.detail.partition(":")[0], fault.level)


def refused(instance: Instance) -> list[dict[str, Any]]:
    document = status_document(instance.engine, instance.now, 0.0)
    found: Any = document["device_faults_refused"]
    line = f"revivemoe_device_faults_refused {float(len(found))}"
    assert line in render_metrics(instance.engine).decode()
    return list(found)


# ---- code by code ---------------------------------------------------------------------------


def test_one_code_taken_back_leaves_what_others_say_of_a_member() -> None:
    instance = serving()
    say(instance, 2, "a")
    say(instance, 2, "b")
    say(instance, 0, "b")
    assert fault_of(instance) == ("a", 2)
    say(instance, 0, "nobody has said this")
    assert fault_of(instance) == ("a", 2)
    say(instance, 0, "a")
    assert fault_of(instance) is None


def test_healthy_without_a_code_takes_all_back() -> None:
    instance = serving(policy=MASK, redundant=0)
    for code in ("a", "b"):
        say(instance, 2, code)
    say(instance, 4, "c")
    assert len(refused(instance)) == 1
    say(instance, 0, "")
    assert (fault_of(instance), refused(instance)) == (None, [])


def test_the_worst_is_shown_and_a_code_may_get_better() -> None:
    instance = serving(policy=MASK, redundant=0)
    say(instance, 2, "a")
    say(instance, 4, "b")
    assert fault_of(instance) == ("b", 4)
    say(instance, 2, "b")
    assert (fault_of(instance), refused(instance)) == (("a", 2), [])
    say(instance, 1, "a")
    assert fault_of(instance) == ("b", 2)


def test_a_device_that_gets_better_may_be_used_again() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    say(instance, 6)
    instance.engine.on_exit(R1, Incarnation(1), "killed", instance.now)
    instance.wait(60)
    assert members(instance) == (0, 2, 3)
    say(instance, 2)
    instance.wait(10)
    assert members(instance) == (0, 1, 2, 3)
    assert fault_of(instance) == ("ecc", 2), "and what is said still is shown of its new process"


@pytest.mark.parametrize("kind", ["slow", "isolate"])
def test_a_monitor_takes_back_its_own_word_only(kind: Any) -> None:
    """Level 0 cleared an operator's isolate, and a slow rank's fault: both were started again."""
    instance = serving(redundant=24, auto_rejoin=True)
    loaded(instance, 40)
    instance.step(2)
    if kind == "isolate":
        Operations(instance.engine).apply("isolate", {"id": 1}, "r1", instance.now)
    else:
        instance.engine.maintenance.drain(Fault(R1, kind, "too slow"), instance.now)
    assert instance.engine.ranks[R1].draining
    say(instance, 2)
    say(instance, 0)
    fault = instance.engine.ranks[R1].fault
    assert fault is not None
    assert fault.kind == kind
    for _ in range(6):
        instance.step()
        instance.wait(0.1)
    say(instance, 6)
    say(instance, 0)
    instance.engine.on_exit(R1, Incarnation(1), "exited", instance.now)
    instance.wait(90)
    assert members(instance) == (0, 2, 3)


def test_a_watched_device_is_no_reason_to_leave_its_rank_out() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    say(instance, 2)
    instance.die(1)
    instance.wait(20)
    assert members(instance) == (0, 1, 2, 3)
    assert fault_of(instance) == ("ecc", 2)


def test_an_outside_monitor_may_take_back_what_has_taken_a_rank_out() -> None:
    """It was told that the rank is out already, which is why it may say so."""
    instance = serving(redundant=24, auto_rejoin=True)
    operations = Operations(instance.engine)
    told = {"id": 1, "level": 6, "code": "fan"}
    operations.apply("report", told, "bad", instance.now)
    instance.deliver()
    instance.engine.on_exit(R1, Incarnation(1), "killed", instance.now)
    instance.wait(60)
    assert members(instance) == (0, 2, 3)
    with pytest.raises(ValueError, match="is out already"):
        operations.apply("report", told, "again", instance.now)
    operations.apply("report", told | {"level": 0}, "good", instance.now)
    instance.wait(10)
    assert members(instance) == (0, 1, 2, 3)


# ---- before the start -----------------------------------------------------------------------


def test_what_was_wrong_before_the_start_is_acted_on() -> None:
    """Monitors tell of changes: what was dropped then was never told again."""
    instance = Instance(redundant=24)
    instance.engine.start(instance.now)
    say_early = DeviceReport(R1, 6, "xid79", "fell off", "test")
    instance.engine.on_health(say_early, instance.now)
    assert not instance.engine.ranks[R1].dead, "nobody can go before all are there"
    instance.deliver()
    instance.wait(1)
    assert members(instance) == (0, 2, 3)
    assert [e["code"] for e in instance.named("device")] == ["xid79"]


def test_what_was_over_before_the_start_is_over() -> None:
    instance = Instance(redundant=24)
    instance.engine.start(instance.now)
    for level, code in ((6, "a"), (0, "a"), (2, "b"), (4, "c"), (0, ""), (2, "d")):
        report = DeviceReport(R1, level, code, "", "test")
        instance.engine.on_health(report, instance.now)
    instance.deliver()
    instance.wait(1)
    assert members(instance) == (0, 1, 2, 3)
    assert fault_of(instance) == ("d", 2)


# ---- the policy's codes ---------------------------------------------------------------------


def test_a_code_has_the_level_that_the_policy_gives_it() -> None:
    codes = (("noise", 0), ("GpuUnhealthy", 4), ("xid79", 2))
    instance = serving(redundant=24, policy=Policy(codes=codes))
    say(instance, 6, "noise")
    assert (fault_of(instance), members(instance)) == (None, (0, 1, 2, 3))
    say(instance, 6, "xid79")
    assert (fault_of(instance), members(instance)) == (("xid79", 2), (0, 1, 2, 3))
    say(instance, 2, "GpuUnhealthy")
    instance.wait(1)
    assert members(instance) == (0, 2, 3)
    actions = [e["action"] for e in instance.named("device")]
    assert actions == ["ignore", "watch", "drain"]


# ---- of several ranks at once ---------------------------------------------------------------


@pytest.mark.parametrize("redundant", [8, 24])
@pytest.mark.parametrize("level", [4, 6])
def test_a_signal_of_the_whole_node_touches_nobody(level: int, redundant: int) -> None:
    """D2: rank after rank was drained, for good: of four ranks two were left, or one."""
    instance = serving(redundant=redundant, auto_rejoin=True)
    sinks = loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, level)
    for _ in range(20):
        instance.step()
        instance.wait(0.5)
    assert members(instance) == (0, 1, 2, 3)
    assert not instance.cluster.commands(Fence)
    (event,) = instance.named("device_refused")
    assert (event["ids"], event["code"], event["level"]) == ([0, 1, 2, 3], "taint", level)
    assert "no attention rank is left" in event["reason"]
    (shown,) = refused(instance)
    assert (shown["ids"], shown["source"], shown["reason"]) == (
        [0, 1, 2, 3],
        "test",
        event["reason"],
    )
    assert [fault_of(instance, rank) for rank in ALL] == [("taint", level)] * 4
    say_of_all(instance, 0)
    assert refused(instance) == []
    assert [fault_of(instance, rank) for rank in ALL] == [None] * 4
    instance.step(40)
    assert_whole(sinks, 40)


def test_ranks_that_stay_may_be_started_again_where_they_were() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    say_of_all(instance, 4)
    instance.die(1)
    instance.wait(20)
    assert members(instance) == (0, 1, 2, 3)
    assert len(instance.named("device_refused")) == 1, "said once"


@pytest.mark.parametrize("level", [4, 6])
def test_two_that_cannot_both_be_spared_stay_both(level: int) -> None:
    """Each could be done without; with the first gone, the second could not."""
    instance = serving(redundant=8, policy=MASK)
    pairs = [(a, b) for a in ALL for b in ALL if a < b]
    faults = [[Fault(r, "whatif", "") for r in pair] for pair in pairs]
    plans = [isinstance(instance.engine.epochs.plan_for(f), Continue) for f in faults]
    pair = pairs[plans.index(False)]
    say_of_all(instance, level, pair)
    instance.wait(5)
    assert members(instance) == (0, 1, 2, 3)
    assert refused(instance)[0]["ids"] == list(pair)
    (event,) = instance.named("device_refused")
    assert "have no replica" in event["reason"] or "would be missing" in event["reason"]


def test_two_that_can_be_spared_drain_and_take_nothing_over_from_each_other() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 60)
    instance.step(2)
    before = len(instance.cluster.commands(Add, 1)) + len(instance.cluster.commands(Add, 2))
    say_of_all(instance, 4, (R1, R2), "gpu")
    for _ in range(30):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0, 3)
    after = len(instance.cluster.commands(Add, 1)) + len(instance.cluster.commands(Add, 2))
    assert after == before
    assert refused(instance) == []
    instance.step(60)
    assert_whole(sinks, 60)


def test_a_lost_device_takes_its_ranks_in_one_recovery() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, 6, (R1, R2), "gpu-lost")
    instance.wait(1)
    assert members(instance) == (0, 3)
    (record,) = instance.engine.epochs.records
    assert {fault.rank for fault in record.faults} == {1, 2}
    instance.step(40)
    assert_whole(sinks, 40)


def test_they_come_back_once_it_is_taken_back() -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    say_of_all(instance, 4, (R1, R2), "gpu")
    instance.wait(1)
    assert members(instance) == (0, 3)
    for rank in (R1, R2):
        instance.engine.on_exit(rank, Incarnation(1), "exited", instance.now)
    instance.wait(60)
    assert members(instance) == (0, 3)
    say_of_all(instance, 0, (R1, R2), "gpu")
    instance.wait(20)
    assert members(instance) == (0, 1, 2, 3)


@pytest.mark.parametrize("level", [0, 2])
def test_who_has_not_begun_to_go_stays_when_it_is_taken_back(level: int) -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, 4, (R1, R2, R3), "gpu")
    say(instance, 4, "its own", R3)
    say_of_all(instance, level, (R1, R2, R3), "gpu")
    for _ in range(30):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0, 2), "one was on its way, and one has a reason of its own"
    assert refused(instance) == []
    instance.step(40)
    assert_whole(sinks, 40)


def test_those_under_way_are_weighed_anew_when_another_rank_is_lost() -> None:
    """They could be done without when it was said; one after the other would leave nobody."""
    instance = serving(redundant=24, auto_rejoin=True)
    loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, 4, (R1, R2, R3), "gpu")
    instance.die(0)
    for _ in range(5):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (1, 2, 3)
    assert [one["ids"] for one in refused(instance)] == [[1, 2, 3]]
    assert not any(instance.engine.ranks[rank].draining for rank in (R1, R2, R3))
    for _ in range(100):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0,), "it is back: now they can go"
    assert refused(instance) == []


def test_two_signals_are_weighed_together() -> None:
    """The second may be affordable, but not with those that are on their way out already."""
    instance = serving(redundant=24)
    loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, 4, (R0, R1), "gpu 0")
    say_of_all(instance, 4, (R2, R3), "gpu 1")
    for _ in range(30):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (2, 3)
    assert [one["code"] for one in refused(instance)] == ["gpu 1"]


def test_what_was_refused_is_tried_again_when_strength_comes_back() -> None:
    instance = serving(redundant=24, policy=MASK, auto_rejoin=True)
    instance.die(2)
    instance.die(3)
    assert members(instance) == (0, 1)
    say_of_all(instance, 4, (R0, R1), "gpu")
    assert len(refused(instance)) == 1
    assert members(instance) == (0, 1)
    instance.wait(30)
    assert members(instance) == (2, 3), "the others are back: now these can go"
    assert refused(instance) == []
    assert len(instance.named("device_refused")) == 1


def test_one_alone_that_was_refused_is_tried_again_too() -> None:
    instance = serving(redundant=24, policy=MASK, auto_rejoin=True)
    for rank in (1, 2, 3):
        instance.die(rank)
    say(instance, 4, rank=R0)
    assert members(instance) == (0,)
    assert len(refused(instance)) == 1
    assert len(instance.named("drain_refused")) == 1
    instance.wait(30)
    assert members(instance) == (1, 2, 3)


def test_an_operator_may_bring_back_one_of_them() -> None:
    instance = serving(redundant=24)
    say_of_all(instance, 4, (R1, R2), "gpu")
    instance.wait(1)
    assert members(instance) == (0, 3)
    instance.engine.on_exit(R1, Incarnation(1), "exited", instance.now)
    Operations(instance.engine).apply("rejoin", {"id": 1}, "r1", instance.now)
    instance.deliver()
    instance.wait(20)
    assert members(instance) == (0, 1, 3)


def test_a_shared_link_that_asks_for_a_retry_gets_one() -> None:
    instance = serving(redundant=24)
    for expected in (1, 2, 3):
        say_of_all(instance, 3, (R1, R2), "link")
        instance.wait(1)
        assert len(instance.engine.epochs.records) == expected, "not one for each rank"
        say_of_all(instance, 0, (R1, R2), "link")
    say_of_all(instance, 3, (R1, R2), "link")
    instance.wait(2)
    assert members(instance) == (0, 3), "too often: they are drained, together"


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_who_has_gone_for_it_stays_out_while_the_others_are_refused(again: bool) -> None:
    """Said once more it brought those back that had left, onto the device that it speaks of."""
    instance = serving(redundant=24, auto_rejoin=True)
    say_of_all(instance, 4, (R1, R2, R3), "xid")
    instance.wait(0.1)
    assert members(instance) == (0, 3)
    for rank in (R1, R2):
        instance.engine.on_exit(rank, Incarnation(1), "exited", instance.now)
    instance.engine.epochs.accuse([Fault(R0, "non_finite", "twice")], instance.now)
    instance.deliver()
    instance.wait(0.3)
    assert [one["ids"] for one in refused(instance)] == [[1, 2, 3]]
    if again:
        repeat(instance, 4, (R1, R2, R3), 2)
    instance.wait(20)
    assert members(instance) == (3,)
    assert len(instance.named("device_refused")) == 1


def test_who_stays_because_its_drain_could_not_be_ended_may_be_started_again() -> None:
    """As it may where the signal itself is refused."""
    instance = serving(redundant=0, spare=8, policy=Policy(drain_timeout_s=1.0))
    loaded(instance, 40)
    instance.step(2)
    say_of_all(instance, 4, (R2, R3), "gpu")
    assert refused(instance) == []
    instance.engine.epochs.attempts.load_failed(instance.now)  # so their experts cannot be moved
    for _ in range(10):
        instance.step()
        instance.wait(0.5)
    assert members(instance) == ALL
    (one,) = refused(instance)
    assert "could not be ended" in one["reason"]
    fleet = instance.engine.epochs.fleet
    assert all(fleet.trusted(instance.engine.ranks[rank]) for rank in (R2, R3))


@pytest.mark.parametrize("later", [(R0, R1), (R0,)], ids=["more", "the same"])
def test_what_is_said_of_more_ranks_later_is_over_for_all(later: tuple[RankId, ...]) -> None:
    """The first word was kept, and drained a healthy rank when strength came back."""
    instance = serving(redundant=24, policy=MASK, auto_rejoin=True)
    for rank in (1, 2, 3):
        instance.die(rank)
    for level, ranks in ((4, (R0,)), (4, later), (0, later)):
        say_of_all(instance, level, ranks, "gpu")
    assert refused(instance) == []
    instance.wait(30)
    assert members(instance) == ALL


def test_what_is_over_for_one_of_them_holds_on_for_the_other() -> None:
    """Two parts of a GPU, of which one recovers: the other, alone, can be spared."""
    instance = serving()
    say_of_all(instance, 4)
    assert refused(instance)
    for rank in (R1, R2, R3):
        report = DeviceReport(rank, 0, "taint", "is over", "test", (R1, R2, R3))
        instance.engine.on_health(report, instance.now)
    instance.wait(5.0)
    assert not refused(instance)
    assert R0 not in members(instance)
    assert {R1, R2, R3} <= set(members(instance))


def test_a_node_that_drains_while_all_its_ranks_are_started_anew_keeps_them() -> None:
    """Nobody was a member, so nothing was weighed, and all that were on their way were ended."""
    instance = serving()
    for rank in ALL:
        instance.engine.on_exit(rank, Incarnation(1), "killed", instance.now)
    assert not any(instance.engine.ranks[rank].member for rank in ALL)
    say_of_all(instance, 4)
    assert len(refused(instance)) == 1
    instance.wait(10)
    assert members(instance) == ALL, "those that came first, and those that came later"
    assert all(event["kind"] != "device_fault" for event in instance.named("fault"))
    assert {instance.engine.ranks[rank].incarnation for rank in members(instance)} == {
        Incarnation(2)
    }
    assert refused(instance), "and still not carried out"


def test_a_signal_whose_ranks_change_and_change_back_is_heard_each_time() -> None:
    instance = serving(redundant=24)
    for ranks in ((R0, R1), ALL, (R0, R1)):
        say_of_all(instance, 4 if ranks == ALL else 2, ranks)
    assert refused(instance) == []
    assert [fault_of(instance, rank) for rank in (R0, R1)] == [("taint", 2)] * 2


def test_an_outside_monitor_takes_back_nothing_that_was_said_of_several() -> None:
    """A rank came back on a GPU that is lost: its source alone can say that it is there again."""
    instance = serving(redundant=24, auto_rejoin=True)
    say(instance, 2, "fan")
    say_of_all(instance, 6, (R1, R2), "gpu-lost")
    for rank in (R1, R2):
        instance.engine.on_exit(rank, Incarnation(1), "killed", instance.now)
    instance.wait(1)
    Operations(instance.engine).apply("report", {"id": 1, "level": 0}, "good", instance.now)
    instance.wait(20)
    assert members(instance) == (0, 3)
    assert instance.engine.ranks[R1].device_codes == ["gpu-lost"]
    say_of_all(instance, 0, (R1, R2), "gpu-lost")
    instance.wait(20)
    assert members(instance) == ALL


def repeat(instance: Instance, level: int, shared: tuple[RankId, ...], times: int) -> None:
    """An Xid that comes again and again, as its source tells it."""
    for number in range(1, times + 1):
        for rank in shared or (R1,):
            report = DeviceReport(rank, level, "xid", f"no. {number}", "test", shared, number)
            instance.engine.on_health(report, instance.now)
        instance.deliver()
        instance.wait(0.2)


@pytest.mark.parametrize("shared", [(), ALL], ids=["one", "all"])
@pytest.mark.parametrize("level", [3, 4])
def test_what_was_refused_and_is_said_again_is_refused_once(
    level: int, shared: tuple[RankId, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storm of Xids was answered with as many plans, and as many events."""
    instance = serving(policy=replace(MASK, max_retries=0), redundant=0)
    repeat(instance, level, shared, 3)
    (since,) = [one["since_s"] for one in refused(instance)]
    plan_for, planned = instance.engine.epochs.plan_for, list[Any]()

    def counted(faults: Any) -> Any:
        planned.append(faults)
        return plan_for(faults)

    monkeypatch.setattr(instance.engine.epochs, "plan_for", counted)
    repeat(instance, level, shared, 5)
    assert len(instance.named("device_refused")) == 1
    assert len(instance.named("drain_refused")) == (0 if shared else 1)
    (shown,) = refused(instance)
    assert shown["since_s"] == pytest.approx(since + 1.0)
    assert planned == []
    assert members(instance) == ALL


def test_the_only_rank_is_started_anew_behind_its_streams() -> None:
    """It is one rank alone: drained it cannot be, and isolated it is started where it was."""
    instance = Instance(1, redundant=0).start()
    sink = instance.submit(max_tokens=20)
    instance.step(3)
    say(instance, 4, "not-ready", R0)
    assert len(refused(instance)) == 1
    say(instance, 6, "out-of-service", R0)
    instance.engine.on_exit(R0, Incarnation(1), "killed", instance.now)
    instance.wait(1)
    assert members(instance) == (0,)
    instance.step(20)
    assert sink.failure is None
    assert len(sink.token_ids()) == 20


def test_a_signal_in_a_pause_waits_for_its_end() -> None:
    instance = serving(redundant=24)
    Operations(instance.engine).apply("pause", {}, "p", instance.now)
    instance.deliver()
    say_of_all(instance, 6, (R1, R2), "gpu")
    instance.wait(1)
    assert members(instance) == (0, 1, 2, 3)
    Operations(instance.engine).apply("resume", {}, "q", instance.now)
    instance.deliver()
    instance.wait(2)
    assert members(instance) == (0, 3)
    assert isinstance(instance.engine.state, Serving)


def test_a_worse_word_replaces_the_refused_one() -> None:
    instance = serving(redundant=24)
    say_of_all(instance, 4)
    say_of_all(instance, 6)
    (shown,) = refused(instance)
    assert shown["level"] == 6
    say_of_all(instance, 2)
    assert refused(instance) == []
    assert members(instance) == (0, 1, 2, 3)


def test_what_is_refused_is_kept_within_bounds() -> None:
    instance = serving(redundant=0, policy=replace(MASK, window_s=10.0))
    for number in range(300):
        say(instance, 4, f"code {number}")
        say(instance, 2, f"watched {number}")
    assert len(refused(instance)) == 256
    assert len(instance.engine.ranks[R1].device_watched) == 64


# ---- together with what others want ---------------------------------------------------------


@pytest.mark.parametrize("who", ["device", "operator"])
def test_a_rank_the_recovery_waits_for_is_planned_for_anew_when_it_is_called_off(who: str) -> None:
    """The hang is seen first, the monitor says so a second later, and the corpse dies slowly: all
    waited for ten minutes for a process that nobody was to start any more.
    """
    instance = serving(redundant=0)
    instance.engine.epochs.accuse([Fault(R1, "hang", "no progress")], instance.now)
    instance.deliver()
    assert isinstance(instance.engine.ranks[R1].life, Condemned)
    if who == "device":
        say(instance, 6)
    else:
        Operations(instance.engine).apply("isolate", {"id": 1}, "r1", instance.now)
    instance.engine.on_exit(R1, Incarnation(1), "killed", instance.now)
    instance.wait(20)
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == ALL, "on its own device again: there is no other one"


@pytest.mark.parametrize("begun", [False, True], ids=["queued", "begun"])
def test_what_an_operator_asks_for_as_well_no_device_takes_back(begun: bool) -> None:
    instance = serving(redundant=24, auto_rejoin=True)
    loaded(instance, 40)
    instance.step(2)
    if not begun:
        instance.engine.maintenance.drain(Fault(R0, "slow", "too slow"), instance.now)
    say(instance, 4)
    Operations(instance.engine).apply("isolate", {"id": 1}, "r1", instance.now)
    say(instance, 0)
    fault = instance.engine.ranks[R1].fault
    assert fault is not None
    assert fault.kind == "isolate"
    for _ in range(12):
        instance.step()
        instance.wait(0.5)
    assert R1 not in members(instance)
    assert [r.request_id for r in instance.engine.epochs.records if r.cause == "isolate"] == ["r1"]
