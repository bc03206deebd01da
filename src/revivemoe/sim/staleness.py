"""Nothing that a process says after it was accused or replaced may change anything."""

from revivemoe.engine.engine import Engine
from revivemoe.messages.reports import Report


def take(engine: Engine, report: Report, now: float) -> None:
    """Deliver a report; assert that one of an old process changes nothing."""
    view = engine.ranks[report.rank]
    stale = report.incarnation != view.incarnation or view.dead
    before = _fingerprint(engine, report) if stale else None
    engine.on_report(report, now)
    assert not stale or _fingerprint(engine, report) == before, (
        f"{type(report).__name__} of rank {report.rank}.{report.incarnation} is accepted at "
        f"{now:.4f} s, but that process is out"
    )


def _fingerprint(engine: Engine, report: Report) -> object:
    """What a report could have changed."""
    view, epochs, traffic = engine.ranks[report.rank], engine.epochs, engine.traffic
    return (
        repr(epochs.fleet.detector._vitals.get(report.rank)),
        (view.ready, view.pid, view.stats, view.dead, view.last_words),
        type(engine.state),
        repr(epochs.coordinator.state),
        traffic.ledger.unfinished(),
        (traffic.totals.generation_tokens, engine.signals.symptoms),
    )
