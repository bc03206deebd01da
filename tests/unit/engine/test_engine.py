"""The engine in one thread: membership, requests and recoveries, with the time passed in."""

from functools import partial
from typing import Any

import pytest
from unit.control_plane import Instance, Sink, answer, submission

from revivemoe.engine.operations import Operations
from revivemoe.epochs.state import FailedState, Recovering, Serving, Starting
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.commands import Abort, Add, Configure, Fence, Inject, Stop, Wake
from revivemoe.messages.reports import Fatal, FenceAck, Heartbeat, RankStats, Ready, Resumed
from revivemoe.recovery.policy import Policy
from revivemoe.streams import EngineUnavailable

PROMPTS = [(1, 2, 3), (4, 5), (6,), (7, 8, 9, 10), (11, 12)]


def serving(**options: Any) -> Instance:
    instance = Instance(**options).start()
    assert isinstance(instance.engine.state, Serving)
    return instance


def loaded(instance: Instance, **params: Any) -> list[Sink]:
    return [instance.submit(prompt, **({"max_tokens": 12} | params)) for prompt in PROMPTS]


def assert_whole(sinks: list[Sink], length: int = 12) -> None:
    for prompt, sink in zip(PROMPTS, sinks, strict=True):
        assert sink.token_ids() == answer(prompt, length)
        assert sink.ended == 1
        assert sink.failure is None


def owner_counts(instance: Instance) -> dict[int, int]:
    return {rank: len(fake.live) for rank, fake in instance.cluster.ranks.items()}


# ---- starting -------------------------------------------------------------------------------


def test_ranks_load_meet_and_serve() -> None:
    instance = Instance(num_ranks=2)
    engine = instance.engine
    engine.start(instance.now)
    assert isinstance(engine.state, Starting)
    reports = instance.cluster.reports
    engine.on_report(reports.popleft(), instance.now)
    engine.on_report(reports.popleft(), instance.now)
    assert not instance.cluster.commands(Configure), "not all are ready"
    instance.deliver()
    assert isinstance(engine.state, Serving)
    configure = instance.cluster.commands(Configure, 1)[0]
    assert (configure.epoch, configure.step, configure.membership.members) == (1, 0, (0, 1))
    assert [e["state"] for e in instance.named("state")] == ["serving"]
    view = engine.ranks[RankId(1)]
    assert (view.pid, view.host, view.ready) == (1001, "here", True)


def test_requests_wait_for_the_start() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    sink = instance.submit((1, 2, 3), max_tokens=3)
    assert not instance.cluster.commands(Add)
    instance.deliver()
    assert len(instance.cluster.commands(Add)) == 1
    instance.step(3)
    assert sink.token_ids() == answer((1, 2, 3), 3)


def test_a_start_that_takes_too_long() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    for _ in range(2):  # Hello and Ready of rank 0
        instance.engine.on_report(instance.cluster.reports.popleft(), instance.now)
    instance.engine.tick(instance.now + 600)
    assert isinstance(instance.engine.state, Starting)
    instance.engine.tick(instance.now + 600.1)
    assert instance.engine.state == FailedState("ranks [1] did not start within 600 s")
    assert sorted(instance.cluster.killed) == [0, 1]


def test_a_start_in_which_they_do_not_meet() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    for _ in range(4):
        instance.engine.on_report(instance.cluster.reports.popleft(), instance.now)
    instance.engine.tick(instance.now + 600)
    instance.engine.tick(instance.now + 600.1)
    assert instance.engine.state == FailedState("ranks [0, 1] did not meet within 600 s")


def test_a_rank_that_ends_while_starting() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    last = Fatal(RankId(1), Incarnation(1), "Traceback ...\nOSError: no such file\n")
    instance.engine.on_report(last, instance.now)
    instance.die(1, deliver=False)
    state = instance.engine.state
    assert state == FailedState("rank 1 ended while starting: OSError: no such file")


def test_last_words_may_come_after_the_exit() -> None:
    """They travel over a socket, the exit does not."""
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    instance.die(1, deliver=False)
    assert isinstance(instance.engine.state, Starting)
    last = Fatal(RankId(1), Incarnation(1), "lower --max-model-len", user_error=True)
    instance.engine.on_report(last, instance.now)
    assert instance.engine.state == FailedState("lower --max-model-len", user_error=True)


def test_a_rank_that_ends_while_starting_without_a_word() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    instance.die(1, deliver=False)
    instance.wait(0.4)
    assert isinstance(instance.engine.state, Starting)
    instance.wait(0.2)
    state = instance.engine.state
    assert state == FailedState("rank 1 ended while starting: process exited")


def test_what_the_user_must_mend_ends_the_start_at_once() -> None:
    instance = Instance(num_ranks=2)
    instance.engine.start(instance.now)
    last = Fatal(RankId(1), Incarnation(1), "lower --max-model-len", user_error=True)
    instance.engine.on_report(last, instance.now)
    assert instance.engine.state == FailedState("lower --max-model-len", user_error=True)
    instance.engine.on_exit(RankId(0), Incarnation(1), "killed", instance.now)
    assert instance.engine.state == FailedState("lower --max-model-len", user_error=True)


# ---- serving --------------------------------------------------------------------------------


def test_requests_spread_and_stream() -> None:
    instance = serving()
    sinks = loaded(instance)
    assert sorted(owner_counts(instance).values()) == [1, 1, 1, 2]
    instance.step(12)
    assert_whole(sinks)
    assert instance.engine.traffic.totals.generation_tokens == 12 * len(PROMPTS)
    assert instance.engine.traffic.totals.finished == {"length": len(PROMPTS)}
    assert instance.engine.signals.last_step == 11


def test_every_member_is_woken_with_a_growing_counter() -> None:
    instance = serving(num_ranks=3)
    instance.submit()
    instance.submit()
    for rank in range(3):
        assert [w.counter for w in instance.cluster.commands(Wake, rank)] == [1, 2]


def test_an_abort_reaches_the_rank() -> None:
    instance = serving(num_ranks=2)
    sink, request = instance.submit_request()
    instance.step()
    instance.engine.abort(request)
    instance.engine.abort(request)
    assert len(instance.cluster.commands(Abort)) == 1
    instance.step(5)
    assert len(sink.token_ids()) == 1
    assert sum(owner_counts(instance).values()) == 0


def test_strangers_and_former_processes_are_not_heard() -> None:
    instance = serving(num_ranks=2)
    stats = RankStats(running=99)
    instance.engine.on_report(Heartbeat(RankId(7), Incarnation(1), 0, stats), instance.now)
    instance.engine.on_report(Heartbeat(RankId(0), Incarnation(2), 0, stats), instance.now)
    assert instance.engine.ranks[RankId(0)].stats.running == 0


# ---- recovery -------------------------------------------------------------------------------


def test_a_death_is_not_noticed_by_any_stream() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(4)
    instance.die(1)
    engine = instance.engine
    assert isinstance(engine.state, Serving)
    assert engine.membership.topology.members == (0, 2, 3)
    assert engine.membership.topology.epoch == 2
    instance.step(8)
    assert_whole(sinks)
    (record,) = engine.epochs.records
    assert (record.outcome, record.migrated, record.reconciled) == ("recovered", 1, 0)
    assert engine.epochs.outcomes == {("process_exit", "recovered"): 1}
    assert engine.traffic.totals.migrated == 1
    assert engine.traffic.ledger.gaps == 0


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_any_rank_at_any_moment(rank: int, at: int) -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(at)
    instance.die(rank)
    instance.step(12)
    assert_whole(sinks)


def test_what_the_dead_rank_committed_and_nobody_took_in_is_dropped() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    instance.step(deliver=False)
    late = [r for r in instance.cluster.reports if r.rank == 1]
    assert late
    for report in late:
        instance.cluster.reports.remove(report)
    instance.die(1)
    for report in late:
        instance.engine.on_report(report, instance.now)
    instance.step(12)
    assert_whole(sinks)


def test_what_a_survivor_committed_before_the_fence_is_kept() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    instance.step(deliver=False)  # under way when the fence is raised
    instance.die(1, deliver=False)
    instance.deliver()
    assert sorted(len(sink.token_ids()) for sink in sinks) == [2, 3, 3, 3, 3]
    assert instance.engine.epochs.records[-1].reconciled == 0
    assert instance.engine.traffic.ledger.gaps == 0
    instance.step(12)
    assert_whole(sinks)


def test_new_requests_wait_while_recovering() -> None:
    instance = serving()
    instance.submit()
    instance.step()
    instance.cluster.sent.clear()
    instance.die(1, deliver=False)
    assert isinstance(instance.engine.state, Recovering)
    sink = instance.submit((9, 9), max_tokens=4)
    assert not instance.cluster.commands(Add)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    assert instance.cluster.commands(Add)
    instance.step(4)
    assert sink.token_ids() == answer((9, 9), 4)


def test_an_abort_while_recovering_is_not_lost() -> None:
    instance = serving()
    sinks = [instance.submit_request(p, max_tokens=12) for p in PROMPTS]
    instance.step(2)
    instance.die(1, deliver=False)
    for _, request in sinks:
        instance.engine.abort(request)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    assert sum(owner_counts(instance).values()) == 0


def test_the_stall_is_from_the_last_old_step_to_the_first_new() -> None:
    instance = serving()
    loaded(instance)
    instance.step(2)
    committed = instance.now
    instance.now += 0.5
    instance.die(1)
    assert instance.engine.epochs.records[-1].stall_s is None, "not yet"
    instance.now += 0.5
    instance.step()
    assert instance.engine.epochs.records[-1].stall_s == pytest.approx(instance.now - committed)
    instance.step(3)
    assert instance.engine.epochs.records[-1].stall_s == pytest.approx(1.01)


def test_tokens_in_flight_move_the_last_old_step() -> None:
    instance = serving()
    loaded(instance)
    instance.step(2)
    instance.step(deliver=False)
    instance.die(1, deliver=False)
    instance.now += 0.125
    instance.deliver()
    instance.step()
    assert instance.engine.epochs.records[-1].stall_s == pytest.approx(0.01)


def test_no_stall_where_nobody_had_work() -> None:
    instance = serving()
    instance.submit(max_tokens=2)
    instance.step(2)
    instance.die(1)
    instance.submit()
    instance.step()
    assert instance.engine.epochs.records[-1].stall_s is None


def test_a_second_death_while_recovering() -> None:
    instance = serving(redundant=16)
    sinks = loaded(instance)
    instance.step(3)
    instance.die(1, deliver=False)
    instance.die(2)
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.membership.topology.members == (0, 3)
    assert instance.engine.membership.topology.epoch == 3
    (record,) = instance.engine.epochs.records
    assert [f.rank for f in record.faults] == [1, 2]
    instance.step(12)
    assert_whole(sinks)


def test_one_death_after_another_down_to_the_last_rank() -> None:
    instance = serving(redundant=24, policy=Policy(repair=("reload", "mask")))
    sinks = loaded(instance)
    for rank in (3, 0, 2):
        instance.step(2)
        instance.die(rank)
        assert isinstance(instance.engine.state, Serving)
    for _ in range(20):
        instance.step()
    assert_whole(sinks)
    assert [r.epoch for r in instance.engine.epochs.records] == [2, 3, 4]
    instance.submit()
    instance.die(1)
    state = instance.engine.state
    assert isinstance(state, FailedState)
    assert "no attention rank is left (rank 1 lost)" in state.reason


def test_a_survivor_that_does_not_answer_is_taken_out() -> None:
    instance = serving(redundant=16)
    sinks = loaded(instance)
    instance.step(2)
    instance.cluster.ranks[RankId(3)].stubborn = True
    instance.die(1)
    instance.wait(9.8)
    assert isinstance(instance.engine.state, Recovering)
    instance.wait(0.4)
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.membership.topology.members == (0, 2)
    assert RankId(3) in instance.cluster.killed
    assert instance.engine.ranks[RankId(3)].dead
    kinds = [f.kind for f in instance.engine.epochs.records[-1].faults]
    assert kinds == ["process_exit", "fence_timeout"]
    instance.step(12)
    assert_whole(sinks)


def test_the_exit_of_a_rank_taken_out_is_no_second_fault() -> None:
    instance = serving(redundant=16)
    instance.cluster.ranks[RankId(3)].stubborn = True
    instance.die(1)
    instance.wait(10.3)
    instance.engine.on_exit(RankId(3), Incarnation(1), "killed", instance.now)
    assert isinstance(instance.engine.state, Serving)
    assert len(instance.engine.epochs.records) == 1


# ---- symptoms -------------------------------------------------------------------------------


def test_an_aborted_step_accuses_nobody() -> None:
    instance = serving()
    for rank in (0, 2, 3):
        instance.cluster.ranks[RankId(rank)].abort_step()
    instance.deliver()
    engine = instance.engine
    assert isinstance(engine.state, Serving)
    assert not any(view.dead or view.fault for view in engine.ranks.values())
    assert engine.signals.symptoms == 3
    instance.die(1)
    assert instance.cluster.killed == [1]
    assert engine.membership.topology.members == (0, 2, 3)
    instance.wait(5)
    assert len(engine.epochs.records) == 1, "the symptom is explained"


def test_an_unexplained_symptom_means_a_new_domain_for_all() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(3)
    for fake in list(instance.cluster.ranks.values()):
        fake.abort_step()
    instance.deliver()
    instance.wait(0.9)
    assert not instance.engine.epochs.records
    instance.wait(0.2)
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.membership.topology.members == (0, 1, 2, 3)
    (record,) = instance.engine.epochs.records
    assert (record.cause, record.faults, record.migrated) == ("communication", [], 0)
    assert instance.cluster.killed == []
    instance.step(12)
    assert_whole(sinks)


def test_symptoms_of_an_epoch_that_is_over_mean_nothing() -> None:
    instance = serving()
    fake = instance.cluster.ranks[RankId(0)]
    instance.die(1)
    fake.epoch = 1
    fake.report(
        Resumed(RankId(0), Incarnation(1), 1, 0, 0.0)  # type: ignore[arg-type]
    )
    fake.abort_step()
    instance.deliver()
    instance.wait(5)
    assert len(instance.engine.epochs.records) == 1


def test_a_symptom_that_comes_after_its_cause_is_explained_too() -> None:
    """Usual where sockets tell the survivors of a death: they abort before they are fenced."""
    instance = serving()
    for rank in (0, 2, 3):
        instance.cluster.ranks[RankId(rank)].abort_step()
    instance.die(1)
    instance.wait(5)
    assert len(instance.engine.epochs.records) == 1


# ---- experts --------------------------------------------------------------------------------


def test_masked_experts_degrade_what_is_under_way_and_what_comes() -> None:
    instance = serving(num_ranks=4, redundant=0, policy=Policy(max_missing_fraction=0.25))
    sinks = loaded(instance)
    instance.step(2)
    assert not instance.engine.degraded
    instance.die(1)
    assert instance.engine.degraded
    assert instance.engine.membership.placement.missing == ((0, 2), (0, 3), (1, 2), (1, 3))
    assert instance.engine.epochs.records[-1].experts_masked == 4
    instance.step(12)
    assert_whole(sinks)
    for sink in sinks:
        assert [d.degraded for d in sink.deltas()] == [False] * 2 + [True] * 10
    late = instance.submit()
    instance.step(1)
    assert late.deltas()[0].degraded


NO_RESTART = Policy(repair=("reload", "mask"))


def test_more_than_the_policy_allows_fails_with_the_reason() -> None:
    instance = serving(num_ranks=4, redundant=0, policy=NO_RESTART)
    sinks = loaded(instance)
    instance.step(2)
    instance.die(1)
    state = instance.engine.state
    assert isinstance(state, FailedState)
    assert "25.0% of a layer's experts would be missing" in state.reason
    for sink in sinks:
        assert sink.failure is not None
        assert state.reason in sink.failure.message
        assert sink.failure.status == 503
        assert sink.ended == 1
    with pytest.raises(EngineUnavailable, match="experts would be missing"):
        instance.submit()
    assert instance.engine.epochs.records[-1].outcome == "failed"
    assert sorted(set(instance.cluster.killed)) == [0, 1, 2, 3]
    assert instance.engine.epochs.outcomes == {("process_exit", "failed"): 1}


def test_a_failed_instance_stays_failed() -> None:
    instance = serving(num_ranks=4, redundant=0, policy=NO_RESTART)
    instance.die(1)
    before = instance.engine.state
    for rank in (0, 2, 3):
        instance.engine.on_exit(RankId(rank), Incarnation(1), "killed", instance.now)
    instance.wait(1000)
    assert instance.engine.state == before
    assert all(view.dead for view in instance.engine.ranks.values())
    assert len(instance.engine.epochs.records) == 1


def test_a_router_that_cannot_be_masked() -> None:
    instance = Instance(num_ranks=4, redundant=0, policy=Policy(repair=("mask",)))
    instance.cluster.maskable = False
    instance.start()
    instance.die(1)
    state = instance.engine.state
    assert isinstance(state, FailedState)
    assert "router cannot be masked" in state.reason


# ---- limits ---------------------------------------------------------------------------------


def in_vain(instance: Instance) -> None:
    """A step is undone, and not done again."""
    instance.cluster.ranks[RankId(0)].abort_step()
    instance.deliver()
    instance.wait(1.1)


def test_recoveries_in_vain_lead_to_a_restart_and_only_then_to_the_end() -> None:
    policy = Policy(max_recoveries=2, max_restarts=1, window_s=60)
    instance = serving(num_ranks=2, policy=policy)
    sink = instance.submit(max_tokens=4)
    for _ in range(2):
        in_vain(instance)
        assert isinstance(instance.engine.state, Serving)
    in_vain(instance)
    (restart,) = instance.named("restart")
    assert "2 recoveries in a row brought no step forward" in restart["reason"]
    for rank in (RankId(0), RankId(1)):
        instance.engine.on_exit(rank, Incarnation(1), "killed", instance.now)
    instance.deliver()
    assert [view.incarnation for view in instance.engine.ranks.values()] == [2, 2]
    assert isinstance(instance.engine.state, Serving)
    assert sink.failure is None
    for _ in range(4):  # the first is made good by the rejoin of a rank
        in_vain(instance)
    state = instance.engine.state
    assert isinstance(state, FailedState)
    assert "1 restarts in a row within 60 s brought no step forward" in state.reason


def test_faults_that_were_survived_are_no_reason_to_stop() -> None:
    instance = serving(num_ranks=2, policy=Policy(max_recoveries=1, max_restarts=0))
    sink = instance.submit(max_tokens=30)
    for _ in range(20):
        instance.step(1)
        in_vain(instance)
    assert isinstance(instance.engine.state, Serving)
    assert sink.failure is None


def test_an_idle_instance_survives_any_number_of_faults() -> None:
    instance = serving(num_ranks=2, policy=Policy(max_recoveries=1, max_restarts=0))
    for _ in range(20):
        in_vain(instance)
    assert isinstance(instance.engine.state, Serving)


def test_retries_that_an_operator_asks_for_never_count() -> None:
    instance = serving(num_ranks=2, policy=Policy(max_recoveries=1, max_restarts=0))
    instance.submit(max_tokens=4)
    for _ in range(20):
        instance.engine.epochs.redo("retry", instance.now, asked=True)
        instance.deliver()
    assert isinstance(instance.engine.state, Serving)


def test_old_recoveries_in_vain_are_forgiven() -> None:
    instance = serving(num_ranks=2, policy=Policy(max_recoveries=1, window_s=60))
    instance.submit(max_tokens=4)
    for _ in range(4):
        in_vain(instance)
        instance.wait(60)
    assert isinstance(instance.engine.state, Serving)
    assert len(instance.engine.epochs.records) == 4


# ---- late and repeated ----------------------------------------------------------------------


def test_a_late_acknowledgement_changes_nothing() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(11)
    fake = instance.cluster.ranks[RankId(0)]
    instance.die(1, deliver=False)
    while not isinstance(instance.cluster.reports[0], Resumed):
        instance.engine.on_report(instance.cluster.reports.popleft(), instance.now)
    assert isinstance(instance.engine.state, Recovering)
    before = len(instance.events)
    again = FenceAck(RankId(0), fake.incarnation, 2, 11, {}, True)
    instance.engine.on_report(again, instance.now)
    assert len(instance.events) == before
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    instance.step(2)
    assert_whole(sinks)


def test_a_second_ready_of_the_same_rank_starts_nothing_anew() -> None:
    instance = serving(num_ranks=2)
    count = len(instance.cluster.sent)
    ready = Ready(RankId(0), Incarnation(1), "cpu", 64, 0.1)
    instance.engine.on_report(ready, instance.now)
    assert len(instance.cluster.sent) == count


# ---- asked by an operator -------------------------------------------------------------------


def test_what_if_does_nothing() -> None:
    instance = serving()
    loaded(instance)
    instance.step()
    before = len(instance.cluster.sent)
    what_if = partial(Operations(instance.engine).apply, "whatif", request_id="", now=instance.now)
    plan = what_if({"ids": [1]})
    assert plan["outcome"] == "recovered"
    assert plan["members"] == [0, 2, 3]
    assert (len(plan["migrations"]), plan["experts_dropped"]) == (1, 8)
    assert plan["experts_masked"] == []
    assert len(instance.cluster.sent) == before
    assert isinstance(instance.engine.state, Serving)
    with pytest.raises(ValueError, match="'ids' 9 is not a rank of this instance"):
        what_if({"ids": [9]})
    everybody = what_if({"ids": [0, 1, 2, 3]})
    assert everybody["outcome"] == "failed"


def test_inject_reaches_a_living_rank_and_no_other() -> None:
    instance = serving()
    instance.submit()
    instance.step(3)
    fault = Inject("x", "kill", step=7)
    operations = Operations(instance.engine)
    operations.inject(fault, RankId(2))
    assert instance.cluster.commands(Inject, 2) == [fault]
    with pytest.raises(ValueError, match=r"step 1 is past: the instance is at 2"):
        operations.inject(Inject("y", "kill", step=1), RankId(2))
    instance.die(2)
    for rank in (2, 9):
        with pytest.raises(ValueError, match=f"id {rank} is not a living rank"):
            operations.inject(fault, RankId(rank))


def test_stop_asks_the_living() -> None:
    instance = serving()
    instance.die(1)
    instance.cluster.sent.clear()
    instance.engine.stop()
    assert sorted(r for r, c in instance.cluster.sent if isinstance(c, Stop)) == [0, 2, 3]
    for rank in (0, 2, 3):
        kinds = [type(c) for r, c in instance.cluster.sent if r == rank]
        assert kinds == [Fence, Stop], "whoever waits for a peer is freed first"


def test_the_events_tell_the_story() -> None:
    instance = serving()
    loaded(instance)
    instance.step(2)
    instance.events.clear()
    instance.die(1)
    kinds = [e["event"] for e in instance.events if e["event"] != "life"]
    told = ["fault", "fence", "state", "configure", "migrated", "recovery", "state"]
    assert kinds == told
    assert instance.named("fault")[0]["id"] == 1
    assert len(instance.named("migrated")[0]["requests"]) == 1
    assert [e["state"] for e in instance.named("state")] == ["recovering", "serving"]
    lives = [(e["id"], e["was"], e["state"]) for e in instance.named("life")]
    assert lives == [(1, "member", "condemned"), (1, "condemned", "gone")]


def test_a_sink_of_the_same_submission_twice() -> None:
    """Request ids may repeat: sequences are told apart by numbers of our own."""
    instance = serving()
    sinks = [Sink(), Sink()]
    for sink in sinks:
        instance.engine.submit(submission((5, 5), request_id="same"), sink)
    instance.step(8)
    assert [sink.token_ids() for sink in sinks] == [answer((5, 5), 8)] * 2


# ---- found by review ------------------------------------------------------------------------


def test_one_rank_stuck_in_the_resume_stage_does_not_take_the_others_with_it() -> None:
    instance = serving(redundant=16, num_ranks=4)
    sinks = loaded(instance)
    instance.step(2)
    for rank in (0, 2, 3):
        instance.cluster.ranks[RankId(rank)].meets_nobody = True
    instance.die(1)
    instance.wait(19.5)
    for rank in (0, 2, 3):
        instance.cluster.ranks[RankId(rank)].meets_nobody = False
    instance.cluster.ranks[RankId(3)].stubborn = True
    instance.wait(1.5)
    assert isinstance(instance.engine.state, Recovering), "fenced again"
    assert not any(instance.engine.ranks[RankId(r)].dead for r in (0, 2, 3)), "nobody accused"
    instance.wait(10.5)
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.membership.topology.members == (0, 2)
    instance.step(12)
    assert_whole(sinks)


def test_a_stall_of_the_engine_accuses_nobody() -> None:
    instance = serving(redundant=16)
    instance.engine.on_exit(RankId(1), Incarnation(1), "gone", instance.now)
    instance.stall(30.0)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.membership.topology.members == (0, 2, 3)


def test_no_host_goes_on_after_an_internal_error() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.engine.fail("internal error: test")
    instance.engine.fail("a second one")
    assert isinstance(instance.engine.state, FailedState)
    assert instance.engine.state.reason == "internal error: test"
    assert all(sink.failure is not None for sink in sinks)


def test_the_fork_server_is_needed_only_while_ranks_start() -> None:
    instance = serving()
    instance.engine.signals.on_forkserver_gone()
    assert isinstance(instance.engine.state, Serving)
