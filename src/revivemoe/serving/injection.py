"""Faults asked for over HTTP: checked, and handed to whoever can bring them about."""

from collections.abc import Mapping

import msgspec

from revivemoe.cluster.local import LocalCluster
from revivemoe.engine.engine import Engine
from revivemoe.engine.operations import Operations
from revivemoe.ids import RankId
from revivemoe.messages.commands import Inject
from revivemoe.messages.reports import PRODUCERS, STEP_PHASES
from revivemoe.recovery.faults import DeviceReport
from revivemoe.streams import Document

INJECTABLE = ("kill", "hang", "error", "slow", "nan", "comm", "device_fault", "memory")


class Injector:
    def __init__(self, engine: Engine, operations: Operations, cluster: LocalCluster) -> None:
        self._engine, self._operations, self._cluster = engine, operations, cluster

    def inject(self, fault: Document, injection_id: str, now: float) -> None:
        """Raises ValueError with what is wrong."""
        inject = parse_injection(fault, injection_id)
        rank = RankId(_int(fault, "id"))
        if inject.kind == "comm":
            inject = self._with_peer(inject, rank)
        if inject.kind == "device_fault":
            self._report(inject, rank, now)
        else:
            self._operations.inject(inject, rank)

    def _with_peer(self, inject: Inject, rank: RankId) -> Inject:
        if self._engine.config.comm_backend != "gloo":
            raise ValueError(
                "kind 'comm' cuts sockets between two ranks: shared memory has none, so it needs "
                "--comm-backend gloo"
            )
        peer = RankId(_int(inject.params, "peer"))
        pid = self._cluster.pid(peer)
        if pid is None or peer == rank or self._engine.ranks[peer].dead:
            raise ValueError(f"'peer' {peer} is not another living rank")
        return msgspec.structs.replace(inject, params={**inject.params, "peer_pid": pid})

    def _report(self, inject: Inject, rank: RankId, now: float) -> None:
        level = _int(inject.params, "level")
        if not 0 <= level <= 6:
            raise ValueError(f"'level' {level} is out of range: 1 to 6, or 0 for healthy again")
        code = str(inject.params.get("code", "injected"))
        report = DeviceReport(rank, level, code, "", "injected")
        last_step = self._engine.signals.last_step
        self._engine.devices.report_at(report, inject.step, last_step, now)


def _int(document: Mapping[str, object], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be an integer")
    return value


def parse_injection(fault: Document, injection_id: str) -> Inject:
    """The fault asked for, as a rank can decode it. Raises ValueError with what is wrong."""
    kind, at = fault.get("kind"), fault.get("at") or {}
    if kind not in INJECTABLE:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(INJECTABLE)}")
    if not isinstance(at, dict) or not at.keys() <= {"step", "layer", "phase"}:
        raise ValueError("'at' must be an object with step, layer, phase")
    if at.get("phase") not in (None, *STEP_PHASES):
        raise ValueError(f"'phase' must be one of {', '.join(STEP_PHASES)}")
    if kind == "nan" and at.get("phase") not in (None, *PRODUCERS):
        raise ValueError(f"kind 'nan' strikes in one of {', '.join(PRODUCERS)}")
    document = {**at, "injection_id": injection_id, "kind": kind}
    try:
        inject = msgspec.convert(
            {"type": "Inject", **document, "params": fault.get("params") or {}}, Inject
        )
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    factor = inject.params.get("factor", 5)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
        raise ValueError("'factor' must be a number of at least 1")
    mebibytes = inject.params.get("mebibytes", 1)
    if not isinstance(mebibytes, int) or isinstance(mebibytes, bool) or mebibytes < 1:
        raise ValueError("'mebibytes' must be an integer of at least 1")
    if inject.params.get("how", "loop") not in ("loop", "stop", "deadlock"):
        raise ValueError("'how' must be loop, stop or deadlock")
    return inject
