"""Nothing that goes wrong inside gets out, and what it should have brought about still comes."""

import pytest
from unit.control_plane import Instance, answer

from revivemoe.engine.intake import TICKS_IN_VAIN, Intake
from revivemoe.engine.metrics import render_metrics
from revivemoe.epochs.state import FailedState, Serving
from revivemoe.ids import Incarnation, RankId

BROKEN = "broken on purpose"


def broken(*args: object, **options: object) -> None:
    raise RuntimeError(BROKEN)


def test_one_report_that_cannot_be_taken_is_counted_told_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    instance = Instance().start()
    intake, sink = Intake(instance.engine), instance.submit((1, 2), max_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(instance.engine.signals, "on_report", broken)
        for rank in instance.cluster.ranks.values():
            rank.beat()
        while instance.cluster.reports:
            intake.report(instance.cluster.reports.popleft(), instance.now)
    assert instance.engine.traffic.totals.internal_errors == {"Heartbeat": 4}
    (told,) = instance.named("internal_error")
    assert BROKEN in told["detail"]
    assert len([r for r in caplog.records if BROKEN in r.getMessage()]) == 1, "not once for each"
    assert b'revivemoe_internal_errors_total{what="Heartbeat"} 4.0' in render_metrics(
        instance.engine
    )
    instance.step(5)
    assert sink.token_ids() == answer((1, 2), 4)


def test_every_way_in_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Instance().start()
    engine, intake, rank = instance.engine, Intake(instance.engine), RankId(0)
    for name in ("on_arrived", "on_exit", "on_health", "tick"):
        monkeypatch.setattr(engine, name, broken)
    monkeypatch.setattr(engine.signals, "on_forkserver_gone", broken)
    intake.arrived(rank, Incarnation(1), 1, 0.0)
    intake.exited(rank, Incarnation(1), "gone", False, 0.0)
    intake.forkserver_gone(0.0)
    intake.health(None, 0.0)  # type: ignore[arg-type]
    intake.tick(0.0)
    assert sum(engine.traffic.totals.internal_errors.values()) == 5


def test_ticks_that_all_fail_end_the_instance_and_single_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instance = Instance().start()
    intake, engine = Intake(instance.engine), instance.engine
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(engine.signals, "tick", broken)
            for _ in range(TICKS_IN_VAIN - 1):
                instance.now += 0.05
                intake.tick(instance.now)
        instance.now += 0.05
        intake.tick(instance.now)
    assert isinstance(engine.state, Serving)
    monkeypatch.setattr(engine.signals, "tick", broken)
    for _ in range(TICKS_IN_VAIN):
        intake.tick(instance.now)
    assert isinstance(engine.state, FailedState)


def test_an_epoch_that_cannot_begin_is_fenced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception between a recovery and the new epoch left no stage, and so no deadline."""
    instance = Instance(4, redundant=24).start()
    intake, sink = Intake(instance.engine), instance.submit((1, 2), max_tokens=8)
    instance.step(2)
    instance.die(1, deliver=False)
    with monkeypatch.context() as patch:
        patch.setattr(instance.engine.epochs, "_begin_epoch", broken)
        while instance.cluster.reports:
            intake.report(instance.cluster.reports.popleft(), instance.now)
    assert not isinstance(instance.engine.state, Serving)
    instance.wait(0.2)
    assert isinstance(instance.engine.state, Serving)
    instance.step(8)
    assert sink.token_ids() == answer((1, 2), 8)
