"""The status document of the public contract, built from the engine in one go."""

from datetime import UTC, datetime

from revivemoe.engine.engine import Engine
from revivemoe.engine.outstanding import life_document, obligations_document
from revivemoe.epochs.rank_view import RankView
from revivemoe.epochs.record import RecoveryRecord
from revivemoe.epochs.state import FailedState, state_name
from revivemoe.recovery.faults import Fault
from revivemoe.streams import Document


def status_document(engine: Engine, now: float, wall: float) -> Document:
    """`GET /v1/fault_tolerance/status`. `now` is monotonic, `wall` seconds since 1970; all times
    in the document are seconds. One snapshot: the engine does not run while it is built.
    """
    views = [engine.ranks[rank] for rank in sorted(engine.ranks)]
    state = engine.state
    return {
        "schema_version": 1,
        "state": state_name(state),
        "reason": state.reason if isinstance(state, FailedState) else None,
        "epoch": engine.membership.epoch,
        "quality": "degraded" if engine.degraded else "full",
        "total_engines": len(views),
        "last_ft_request_id": engine.last_ft_request_id,
        "engines": [_engine(engine, view, now) for view in views],
        "experts": _experts(engine),
        "dense_ffn_groups": _dense_groups(engine),
        "device_faults_refused": _refused(engine, now),
        "obligations": obligations_document(engine, now),
        "recoveries": [_recovery(record, now, wall) for record in engine.epochs.records],
    }


def _engine(engine: Engine, view: RankView, now: float) -> Document:
    fleet, topology = engine.epochs.fleet, engine.membership.topology
    member = view.member and view.rank in topology.members
    age_s = fleet.detector.age_s(view.rank, now)
    stats = view.stats
    return {
        "id": view.rank,
        "status": _status(engine, view, now),
        "roles": topology.roles(view.rank) if member else [],
        "logical_rank": topology.logical_rank(view.rank) if member else None,
        "incarnation": view.incarnation,
        "pid": view.pid,
        "host": view.host,
        "device": view.device,
        "running": 0 if view.dead else stats.running,
        "waiting": 0 if view.dead else stats.waiting,
        "kv_blocks_used": 0 if view.dead else stats.kv_blocks_used,
        "kv_blocks_total": stats.kv_blocks_total,
        "last_step": stats.last_step,
        "graphs": view.graphs,
        "recompiled": stats.recompiled,
        "heartbeat_age_s": None if age_s is None else round(age_s, 4),
        "fault_info": None if view.fault is None else _fault(view.fault),
        "life": life_document(view, now),
    }


def _status(engine: Engine, view: RankView, now: float) -> str:
    if view.dead and view.incarnation:
        return "dead"
    if not view.member:
        return "joining"
    if view.draining:
        return "draining"
    if view.fault is not None:
        return "unhealthy"
    suspect = view.slow is not None or engine.epochs.fleet.detector.suspect(view.rank, now)
    return "suspect" if suspect else "healthy"


def _experts(engine: Engine) -> Document:
    membership, placement = engine.membership, engine.membership.placement
    return {
        "layers": len(placement.layers),
        "experts_per_layer": placement.num_experts,
        "slots_per_layer": sum(len(table[0]) for table in placement.slots.values() if table),
        "missing": [[layer, expert] for layer, expert in membership.missing],
        "uncovered_by_one_more_fault": max(map(len, membership.sole_holders.values()), default=0),
    }


def _dense_groups(engine: Engine) -> list[Document]:
    dense = engine.membership.dense
    if dense is None:
        return []
    healthy = dense.healthy(engine.membership.attention)
    return [{"ranks": list(g), "healthy": g in healthy} for g in (*dense.home, *dense.extra)]


def _refused(engine: Engine, now: float) -> list[Document]:
    """What monitors ask for and the instance cannot afford: nobody of `ids` is touched for it."""
    return [
        {
            "ids": list(one.signal.ranks),
            "source": one.signal.source,
            "code": one.signal.code,
            "level": one.signal.level,
            "action": one.signal.action,
            "reason": one.reason,
            "since_s": round(now - one.since, 3),
        }
        for one in engine.devices.signals.refused
    ]


def _fault(fault: Fault) -> Document:
    return {"id": fault.rank, "kind": fault.kind, "level": fault.level, "detail": fault.detail}


def _recovery(record: RecoveryRecord, now: float, wall: float) -> Document:
    started = datetime.fromtimestamp(wall - (now - record.started), UTC)
    return {
        "epoch": record.epoch,
        "cause": record.cause,
        "faults": [_fault(fault) for fault in record.faults],
        "reason": record.reason,
        "started_at": started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "outcome": record.outcome,
        "detect_s": record.detect_s,
        "stall_s": record.stall_s,
        "phases": dict(record.phases),
        "migrated": record.migrated,
        "recomputed_tokens": record.recomputed_tokens,
        "experts_dropped": record.experts_dropped,
        "experts_reloaded": record.experts_reloaded,
        "experts_masked": record.experts_masked,
        "role_switched": record.role_switched,
        "recompiled": record.recompiled,
        "restarted": list(record.restarted),
        "rolled_back": record.rolled_back,
        "request_id": record.request_id,
    }
