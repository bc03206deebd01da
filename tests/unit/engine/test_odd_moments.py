"""Orders of events that a review found: each broke something once."""

from unit.control_plane import FakeRank, Instance

from revivemoe.engine.metrics import render_metrics
from revivemoe.engine.operations import Operations
from revivemoe.engine.status import status_document
from revivemoe.epochs.state import Serving
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Hello, Ready, Report, Resumed, Tokens
from revivemoe.recovery.policy import Policy


def test_a_fault_in_a_pause_that_outlasts_the_window_can_be_resumed_from() -> None:
    instance = Instance().start()
    operations = Operations(instance.engine)
    operations.apply("pause", {}, "p", instance.now)
    instance.deliver()
    instance.die(0)
    instance.wait(Policy().window_s + 1)
    plan = operations.apply("whatif", {"ids": [1]}, "w", instance.now)
    assert plan is not None
    assert plan["outcome"] == "recovered"
    operations.apply("resume", {}, "r", instance.now)
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)


def test_a_restart_that_outlasts_the_window_ends_when_the_rank_is_ready() -> None:
    policy = Policy(window_s=5.0, max_missing_fraction=0.0)
    instance = Instance(num_ranks=2, redundant=0, policy=policy).start()
    instance.submit()
    instance.step(2)

    def launch_slowly(rank: RankId, incarnation: Incarnation, slots: object) -> None:
        fake = FakeRank(rank, incarnation, instance.cluster.reports.append)
        instance.cluster.ranks[rank] = fake
        fake.report(Hello(rank, incarnation, 1, "here"))

    instance.cluster.launch = launch_slowly  # type: ignore[method-assign, assignment]
    instance.die(0)
    instance.wait(7)
    fake = instance.cluster.ranks[RankId(0)]
    fake.report(Ready(fake.rank, fake.incarnation, "cpu", 64, 0.5))
    instance.deliver()
    assert isinstance(instance.engine.state, Serving)


def test_tokens_before_a_second_fault_make_no_negative_stall() -> None:
    """The first tokens of an epoch may overtake its last `Resumed`, whose rank then dies."""
    instance = Instance().start()
    for number in range(8):
        instance.submit((1, 2, number), max_tokens=200)
    instance.step(3)
    instance.die(0, deliver=False)

    def deliver_without(*kinds: type[Report]) -> None:
        while instance.cluster.reports:
            report = instance.cluster.reports.popleft()
            if report.rank != 3 or not isinstance(report, kinds):
                instance.engine.on_report(report, instance.now)

    deliver_without(Resumed)
    instance.step(1, deliver=False)
    deliver_without(Resumed, Tokens)
    instance.step(1, deliver=False)
    in_flight = list(instance.cluster.reports)
    instance.cluster.reports.clear()
    instance.now += 0.01
    instance.die(3, deliver=False)
    instance.now += 0.01
    for report in in_flight:
        instance.engine.on_report(report, instance.now)
    instance.deliver()
    instance.step(2)
    (record,) = instance.engine.epochs.records
    assert record.stall_s is not None
    assert record.stall_s >= 0
    assert status_document(instance.engine, instance.now, 0.0)["state"] == "serving"
    assert b"stall_seconds" in render_metrics(instance.engine)


def test_a_wish_to_drain_dies_with_the_process_that_was_meant() -> None:
    instance = Instance(policy=Policy(drain_timeout_s=30)).start()
    operations = Operations(instance.engine)
    for number in range(8):
        instance.submit((1, 2, number), max_tokens=200)
    instance.step(3)
    operations.apply("scale_down", {"ids": [1, 2]}, "s", instance.now)
    instance.wait(0.3)
    instance.die(2)
    instance.wait(0.3)
    operations.apply("rejoin", {"id": 2}, "r", instance.now)
    instance.deliver()
    for _ in range(60):
        instance.step()
        instance.wait(0.1)
    assert instance.engine.membership.members == (0, 2, 3)


def test_a_suspect_that_is_drained_off_its_trial_is_cleared_by_its_next_token() -> None:
    instance = Instance().start()
    instance.submit(max_tokens=200)
    instance.step(2)
    ledger = instance.engine.traffic.ledger

    def owner() -> RankId:
        (view,) = ledger.unfinished()
        assert view.owner is not None
        return view.owner

    crashed = instance.cluster.ranks.pop(owner())
    instance.engine.on_exit(crashed.rank, crashed.incarnation, "x", instance.now, by_itself=True)
    instance.deliver()
    trial = owner()
    assert ledger.suspects.trials == {trial}
    operations = Operations(instance.engine)
    operations.apply("isolate", {"id": trial}, "i", instance.now)
    instance.wait(2.0)  # moved, without a token; then the rank leaves
    assert trial not in instance.engine.membership.members
    instance.step(3)
    assert not ledger.suspects
