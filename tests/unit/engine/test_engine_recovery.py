"""The engine beyond single deaths: restart, rejoin, drain, reload, redo, quarantine, pause."""

from typing import Any

import pytest
from unit.control_plane import Instance, Sink, answer

from revivemoe.engine.operations import Operations
from revivemoe.epochs.state import FailedState, Paused, Recovering, Serving
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.commands import Abort, Add, Configure, Fence, LoadExperts, Stop
from revivemoe.messages.reports import Activity, ExpertsLoaded, NonFinite
from revivemoe.recovery.faults import DeviceReport
from revivemoe.recovery.policy import Policy

PROMPTS = tuple((10 * k + 1, 10 * k + 2, 10 * k + 3) for k in range(8))


def loaded(instance: Instance, max_tokens: int = 12) -> list[Sink]:
    return [instance.submit(prompt, max_tokens=max_tokens) for prompt in PROMPTS]


def assert_whole(sinks: list[Sink], max_tokens: int = 12) -> None:
    for prompt, sink in zip(PROMPTS, sinks, strict=True):
        assert sink.failure is None
        assert sink.token_ids() == answer(prompt, max_tokens)
        assert sink.ended == 1


def serving(redundant: int = 8, **options: Any) -> Instance:
    return Instance(num_ranks=4, redundant=redundant, **options).start()


def members(instance: Instance) -> tuple[int, ...]:
    return instance.engine.membership.topology.members


# ---- restart --------------------------------------------------------------------------------


def test_all_ranks_at_once_are_started_anew_behind_the_streams() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(3)
    for rank in range(4):
        instance.die(rank, deliver=False)
    instance.deliver()
    instance.wait(0.3)
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == (0, 1, 2, 3)
    assert {v.incarnation for v in instance.engine.ranks.values()} == {2}
    instance.step(12)
    assert_whole(sinks)
    assert instance.engine.epochs.records[0].outcome == "restarted"


def test_only_the_lost_rank_is_started_anew_and_the_survivors_keep_what_they_hold() -> None:
    instance = serving(redundant=0)
    sinks = loaded(instance)
    instance.step(3)
    held = {r: set(fake.live) for r, fake in instance.cluster.ranks.items() if r != 1}
    instance.cluster.sent.clear()
    instance.die(1)
    (record,) = instance.engine.epochs.records
    assert (record.outcome, record.restarted) == ("restarted", (1,))
    for rank, sequences in held.items():
        assert not instance.cluster.commands(Abort, rank)
        assert not {a.sequence.seq_id for a in instance.cluster.commands(Add, rank)} & sequences
    assert instance.engine.membership.missing == ()
    instance.step(12)
    assert_whole(sinks)


def test_restarts_come_to_an_end() -> None:
    instance = serving(redundant=0, policy=Policy(max_restarts=2))
    sinks = loaded(instance)
    instance.step(2)
    launch = instance.cluster.launch

    def stillborn(rank: RankId, incarnation: Incarnation, slots: Any) -> None:
        launch(rank, incarnation, slots)
        instance.cluster.ranks.pop(rank)
        while instance.cluster.reports and instance.cluster.reports[-1].rank == rank:
            instance.cluster.reports.pop()

    instance.cluster.launch = stillborn  # type: ignore[method-assign]
    instance.die(1)
    for incarnation in (2, 3, 4, 5):
        if isinstance(instance.engine.state, FailedState):
            break
        instance.engine.on_exit(RankId(1), Incarnation(incarnation), "died", instance.now)
        instance.deliver()
        instance.wait(5)  # the second restart, and any after it, is not at once
    state = instance.engine.state
    assert isinstance(state, FailedState)
    assert "2 restarts" in state.reason
    assert all(sink.failure is not None for sink in sinks)


def test_a_corpse_that_does_not_die_is_left_behind() -> None:
    """Its memory may still be written to, so its rank cannot be started anew."""
    instance = serving(redundant=0, policy=Policy(corpse_timeout_s=20))
    instance.step(1)
    instance.cluster.ranks[RankId(1)].mute = True
    instance.wait(1.6)
    instance.wait(19)
    assert isinstance(instance.engine.state, Recovering), "waiting for the corpse to go"
    instance.wait(2)
    assert instance.named("unkillable")
    assert isinstance(instance.engine.state, FailedState)


# ---- rejoin and drain -----------------------------------------------------------------------


def test_a_rank_rejoins_at_a_step_boundary() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    instance.die(1)
    instance.step(2)
    instance.cluster.sent.clear()
    instance.engine.maintenance.rejoin(RankId(1), instance.now, "req")
    instance.deliver()
    instance.wait(0.3)
    assert members(instance) == (0, 1, 2, 3)
    assert instance.engine.epochs.records[-1].cause == "rejoin"
    assert instance.engine.epochs.records[-1].request_id == "req"
    assert all(fence.at_boundary for fence in instance.cluster.commands(Fence))
    assert not instance.cluster.commands(Abort)
    instance.step(12)
    assert_whole(sinks)


def test_a_joiner_that_dies_while_loading_disturbs_nobody() -> None:
    instance = serving()
    instance.die(1)
    launch = instance.cluster.launch
    instance.cluster.launch = lambda *args: None  # type: ignore[method-assign]
    instance.engine.maintenance.rejoin(RankId(1), instance.now, None)
    instance.engine.on_exit(RankId(1), Incarnation(2), "died", instance.now)
    instance.cluster.launch = launch  # type: ignore[method-assign]
    assert isinstance(instance.engine.state, Serving)
    assert len(instance.engine.epochs.records) == 1
    assert instance.engine.ranks[RankId(1)].dead


def device(instance: Instance, level: int, rank: int = 1) -> None:
    report = DeviceReport(RankId(rank), level, "80E18005", "HBM", "report")
    instance.engine.on_health(report, instance.now)
    instance.deliver()


def test_a_drain_moves_the_sequences_first_and_undoes_nothing() -> None:
    instance = serving()
    sinks = loaded(instance, 40)
    instance.step(3)
    device(instance, 4)
    assert instance.engine.ranks[RankId(1)].draining
    assert isinstance(instance.engine.state, Serving), "nobody is stopped while targets warm up"
    for _ in range(6):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0, 2, 3)
    (record,) = instance.engine.epochs.records
    assert (record.cause, record.outcome, record.migrated) == ("device_fault", "recovered", 0)
    assert instance.cluster.commands(Stop, 1)
    assert all(fence.at_boundary for fence in instance.cluster.commands(Fence))
    instance.engine.on_exit(RankId(1), Incarnation(1), "exited", instance.now)
    assert len(instance.engine.epochs.records) == 1, "that it ends is what was asked for"
    instance.step(40)
    assert_whole(sinks, 40)


def test_new_requests_stay_away_from_a_rank_that_is_drained() -> None:
    instance = serving()
    loaded(instance, 40)
    instance.step(2)
    device(instance, 4)
    instance.cluster.sent.clear()
    loaded(instance)
    assert not instance.cluster.commands(Add, 1)


def test_a_drain_that_nobody_could_take_over_from_is_refused() -> None:
    instance = serving(redundant=0, policy=Policy(repair=("mask",)))
    device(instance, 4)
    assert members(instance) == (0, 1, 2, 3)
    assert instance.named("drain_refused")
    assert instance.engine.ranks[RankId(1)].fault is not None


def test_a_drain_is_taken_up_again_after_a_fault() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 40)
    instance.step(2)
    device(instance, 4)
    instance.die(2)
    assert members(instance) == (0, 1, 3)
    for _ in range(6):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0, 3)
    instance.step(40)
    assert_whole(sinks, 40)


def test_what_is_drained_may_die_meanwhile() -> None:
    instance = serving()
    sinks = loaded(instance, 40)
    instance.step(2)
    device(instance, 4)
    instance.die(1)
    instance.wait(0.5)
    instance.step(40)
    assert_whole(sinks, 40)
    assert [r.cause for r in instance.engine.epochs.records] == ["process_exit"]


def test_a_drain_that_cannot_be_ended_is_called_off() -> None:
    """A load beside the steps was never answered: at the boundary nobody had the leaver's experts,
    and the instance failed for what an operator had asked for."""
    instance = serving(redundant=0, policy=Policy(drain_timeout_s=5.0), spare=2)
    device(instance, 4)
    assert instance.engine.ranks[RankId(1)].draining
    assert instance.cluster.commands(LoadExperts)
    instance.wait(10)
    assert isinstance(instance.engine.state, Serving)
    assert members(instance) == (0, 1, 2, 3)
    assert not instance.engine.ranks[RankId(1)].draining
    assert instance.named("drain_refused")


# ---- levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "status", "epochs"),
    [(1, None, 0), (2, "fault", 0), (3, None, 1), (5, "dead", 1), (6, "dead", 1)],
)
def test_levels_and_what_they_ask_for(level: int, status: str | None, epochs: int) -> None:
    instance = serving()
    device(instance, level)
    view = instance.engine.ranks[RankId(1)]
    assert view.dead == (status == "dead")
    assert (view.fault is not None) == (status is not None)
    assert len(instance.engine.epochs.records) == epochs
    device(instance, 0)
    assert view.fault is None or view.dead


def test_levels_are_the_policys() -> None:
    instance = serving(policy=Policy(levels=("isolate",) * 6))
    device(instance, 1)
    assert instance.engine.ranks[RankId(1)].dead


# ---- experts --------------------------------------------------------------------------------


def spare(**policy: Any) -> Instance:
    return Instance(4, 0, Policy(max_missing_fraction=0.5, **policy), spare=2).start()


def test_masked_at_once_and_whole_when_the_experts_are_there() -> None:
    instance = spare(serve_masked_meanwhile=True)
    sinks = loaded(instance)
    instance.step(2)
    instance.die(1)
    assert instance.engine.degraded
    loads = [(r, c) for r, c in instance.cluster.sent if isinstance(c, LoadExperts)]
    assert sum(len(c.loads) for _, c in loads) == 4
    for rank, command in loads:
        done = ExpertsLoaded(rank, Incarnation(1), command.request, 0.5, 100)
        instance.cluster.reports.append(done)
    instance.deliver()
    instance.wait(0.3)
    assert not instance.engine.degraded
    assert [r.cause for r in instance.engine.epochs.records] == ["process_exit", "restore_experts"]
    instance.step(12)
    assert_whole(sinks)


def test_what_a_lost_rank_was_loading_is_forgotten() -> None:
    instance = spare(serve_masked_meanwhile=True)
    instance.die(1)
    loads = [(r, c) for r, c in instance.cluster.sent if isinstance(c, LoadExperts)]
    instance.die(loads[0][0])
    loading = instance.engine.epochs.loads.loading
    assert loads[0][0] not in {reload.rank for reload in loading}


def test_experts_that_cannot_be_loaded_are_not_tried_again_at_once() -> None:
    instance = spare()
    instance.cluster.hold_resumed = True
    instance.die(1)
    assert instance.engine.epochs.coordinator.plan is not None
    assert instance.engine.epochs.coordinator.plan.reloads
    instance.cluster.hold_resumed = False
    failed = ExpertsLoaded(RankId(0), Incarnation(1), 0, 0.1, 0, "no such file")
    instance.cluster.reports.append(failed)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)
    assert instance.engine.degraded, "masked instead"
    assert instance.named("load_failed")


# ---- numbers --------------------------------------------------------------------------------


def nan(instance: Instance, rank: int, here: bool = True) -> None:
    fake = instance.cluster.ranks[RankId(rank)]
    claim = NonFinite(
        fake.rank,
        fake.incarnation,
        fake.epoch,
        fake.step,
        2,
        "experts",
        here,  # type: ignore[arg-type]
    )
    instance.cluster.reports.append(claim)
    instance.deliver()


def test_non_finite_numbers_are_redone_once_and_then_isolate_their_producer() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    nan(instance, 2, here=False)
    nan(instance, 1)
    assert members(instance) == (0, 1, 2, 3)
    instance.step(2)
    nan(instance, 1)
    assert members(instance) == (0, 2, 3)
    instance.step(12)
    assert_whole(sinks)


# ---- quarantine -----------------------------------------------------------------------------


def crash(instance: Instance, rank: RankId) -> None:
    fake = instance.cluster.ranks.pop(rank)
    instance.engine.on_exit(
        fake.rank, fake.incarnation, "exit status 1", instance.now, by_itself=True
    )
    instance.deliver()


def home_of(instance: Instance, seq_id: int) -> RankId | None:
    found = [r for r, fake in instance.cluster.ranks.items() if SeqId(seq_id) in fake.live]
    return found[0] if found else None


def test_a_poison_request_ends_alone_after_two_ranks() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 30)
    instance.step(2)
    poison, crashes = 3, 0
    for _ in range(10):
        while (home := home_of(instance, poison)) is not None:  # before it can get on by a token
            crash(instance, home)
            crashes += 1
        instance.step()
        instance.wait(0.1)
    assert crashes == 2
    assert sinks[poison].failure is not None
    instance.step(30)
    for number, (prompt, sink) in enumerate(zip(PROMPTS, sinks, strict=True)):
        if number != poison:
            assert sink.failure is None
            assert sink.token_ids() == answer(prompt, 30)
    assert instance.engine.traffic.totals.convicted == 1


def test_what_is_killed_from_outside_once_makes_no_suspects() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 30)
    instance.step(2)
    instance.die(0)
    assert not instance.engine.traffic.ledger.suspects
    instance.step(30)
    assert_whole(sinks, 30)


def test_innocent_suspects_are_cleared_by_a_token_each() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 30)
    instance.step(2)
    crash(instance, RankId(1))
    assert len(instance.engine.traffic.ledger.suspects) == 2
    for _ in range(4):
        instance.step()
    assert not instance.engine.traffic.ledger.suspects
    instance.step(30)
    assert_whole(sinks, 30)


# ---- silence and hangs end to end -----------------------------------------------------------


def test_a_silent_rank_is_accused_and_a_hung_one_too() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance)
    instance.step(2)
    instance.cluster.ranks[RankId(1)].mute = True
    instance.wait(1.2)
    assert isinstance(instance.engine.state, Serving)
    instance.wait(0.5)
    assert members(instance) == (0, 2, 3)
    instance.cluster.ranks[RankId(2)].activity = Activity("working", "experts", 1, 3, 1.4, 0.01)
    instance.wait(0.3)
    assert members(instance) == (0, 3)
    assert [f.kind for r in instance.engine.epochs.records for f in r.faults] == [
        "heartbeat",
        "hang",
    ]
    for _ in range(30):
        instance.step()
    assert_whole(sinks)


# ---- operators ------------------------------------------------------------------------------


def apply(instance: Instance, instruction: str, request_id: str = "r1", **params: Any) -> Any:
    found = Operations(instance.engine).apply(instruction, params, request_id, instance.now)
    instance.deliver()
    return found


def test_pause_and_resume() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    apply(instance, "pause")
    assert isinstance(instance.engine.state, Paused)
    late = instance.submit((5, 5, 5), max_tokens=4)
    instance.wait(30)
    assert isinstance(instance.engine.state, Paused), "for as long as it takes"
    apply(instance, "resume", "r2")
    assert isinstance(instance.engine.state, Serving)
    instance.step(12)
    assert_whole(sinks)
    assert late.token_ids() == answer((5, 5, 5), 4)
    assert instance.engine.last_ft_request_id == "r2"


def test_a_fault_while_paused_is_recovered_from_at_the_resume() -> None:
    instance = serving()
    sinks = loaded(instance)
    instance.step(2)
    apply(instance, "pause")
    instance.die(1)
    assert isinstance(instance.engine.state, Paused)
    apply(instance, "resume", "r2")
    assert members(instance) == (0, 2, 3)
    instance.step(12)
    assert_whole(sinks)


def test_a_request_id_is_taken_once() -> None:
    instance = serving()
    operations = Operations(instance.engine)
    for _ in range(2):
        operations.apply("retry", {}, "same", instance.now)
        instance.deliver()
    assert len(instance.engine.epochs.records) == 1
    assert instance.engine.epochs.records[0].cause == "retry"


@pytest.mark.parametrize(
    ("instruction", "params", "says"),
    [
        ("dance", {}, "choose one of"),
        ("isolate", {}, "'id' must be an integer"),
        ("isolate", {"id": 9}, "not a rank"),
        ("isolate", {"id": 1, "now": True}, "unknown parameter 'now'"),
        ("report", {"id": 1, "level": 7}, "out of range"),
        ("restore_experts", {}, "no expert is missing"),
        ("rejoin", {"id": 1}, "is not out"),
        ("role_switch", {"id": 1}, "--expert-ranks"),
        ("scale_down", {"ids": []}, "list of rank ids"),
        ("scale_down", {"ids": [0, 1, 2, 3]}, "cannot go on without"),
        ("scale_down", {"ids": [9]}, "not a rank"),
        ("scale_down", {"ids": [1], "timeout": -1}, "'timeout' must be"),
        ("retry", {"timeout": "soon"}, "'timeout' must be"),
        ("whatif", {"ids": [7]}, "not a rank"),
    ],
)
def test_refusals_say_why(instruction: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        apply(serving(), instruction, **params)


@pytest.mark.parametrize("name", ["ids", "ranks", "exclude_dp_ranks"])
def test_scale_down_of_ranks_that_are_gone_keeps_them_out(name: str) -> None:
    """vLLM's orchestrators name all that are lost, and a time."""
    instance = Instance(4, redundant=24, auto_rejoin=True).start()
    instance.die(1)
    instance.wait(0.1)
    apply(instance, "scale_down", **{name: [1], "timeout": 60})
    instance.wait(120)
    assert members(instance) == (0, 2, 3)
    assert not instance.named("launch")


def test_scale_down_takes_ranks_out_one_after_the_other() -> None:
    instance = serving(redundant=24)
    sinks = loaded(instance, 40)
    instance.step(2)
    apply(instance, "scale_down", ids=[1, 2])
    for _ in range(12):
        instance.step()
        instance.wait(0.1)
    assert members(instance) == (0, 3)
    assert len(instance.cluster.commands(Configure)) == 4 + 3 + 2
    instance.step(40)
    assert_whole(sinks, 40)
