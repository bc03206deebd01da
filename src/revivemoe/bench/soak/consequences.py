"""Whether what must come of a fault is there, by two status documents."""

from revivemoe.bench.documents import Recovery, Status
from revivemoe.bench.soak.schedule import Fault


def came(fault: Fault, before: Status, status: Status) -> bool:
    """Whether the consequence of a fault is there, and the instance serves with it."""
    match fault.kind.consequence:
        case "nothing" | "noticed":
            return status["state"] == "serving"
        case "epoch":
            return status["state"] == "serving" and status["epoch"] > before["epoch"]
        case "lost":
            return all(out(rank, before, status) for rank in fault.ranks)


def member(rank: int, status: Status) -> bool:
    """Whether a rank takes part, in whatever condition."""
    engine = status["engines"][rank]
    away = engine["status"] in ("dead", "joining", "draining")
    return status["state"] == "serving" and engine["logical_rank"] is not None and not away


def out(rank: int, before: Status, status: Status) -> bool:
    """Whether it serves without the process that a rank had."""
    had, has = before["engines"][rank], status["engines"][rank]
    replaced = has["status"] == "dead" or has["incarnation"] > had["incarnation"]
    return replaced and status["state"] == "serving" and status["epoch"] > before["epoch"]


def unprovoked(status: Status, since_epoch: int, touched: tuple[int, ...]) -> list[str]:
    """Accusations since then of ranks that nobody had touched."""
    new: list[Recovery] = [r for r in status["recoveries"] if r["epoch"] > since_epoch]
    return [
        f"rank {fault['id']}: {fault['kind']}: {fault['detail']}"
        for recovery in new
        for fault in recovery["faults"]
        if fault["id"] not in touched
    ]
