"""What the instance waits for, as an operator reads it: `obligations` of the status document."""

from revivemoe.engine.engine import Engine
from revivemoe.epochs.rank_life import WAITS_FOR, deadline
from revivemoe.epochs.rank_view import RankView
from revivemoe.epochs.stages import Idle
from revivemoe.streams import Document


def life_document(view: RankView, now: float) -> Document:
    """Where a rank's process stands, since when, until when, and what it waits for. Seconds."""
    name, until = type(view.life).__name__, deadline(view.life)
    return {
        "state": name.lower(),
        "since_s": round(now - view.life.since, 3) if view.incarnation else None,
        "due_s": None if until is None else round(until - now, 3),
        "waits_for": WAITS_FOR[name],
    }


def obligations_document(engine: Engine, now: float) -> list[Document]:
    """Everything outstanding, the next to be due first: what, for whom, due in how many seconds
    (below 0: about to be seen to), and what happens if it is not met by then.
    """
    owed = [(o.what.lower(), o.who, o.due, o.then) for o in engine.epochs.fleet.lives.obligations]
    stage, drain = engine.epochs.coordinator.state, engine.maintenance.drains.under_way
    if not isinstance(stage, Idle) and not engine.epochs.coordinator.holding:
        name = type(stage).__name__.lower()
        owed.append((name, None, stage.deadline, "whoever has not answered is accused"))
    if drain is not None:
        owed.append(("drain", drain.wanted.fault.rank, drain.deadline, "what it runs moves as is"))
    return [
        {"what": what, "for": who, "due_s": round(due - now, 3), "then": then}
        for what, who, due, then in sorted(owed, key=lambda one: one[2])
    ]
