"""What a Kubernetes Node says of its devices, as reports. Pure: no client, no clock, no log.

Three things are read, each with a table of levels L1 .. L6:

* the faults that Ascend's device plugin writes, as JSON, under `huawei.com/Ascend910-Fault` (and
  for other chips): into the ConfigMap `mindx-dl-deviceinfo-NODE` of `kube-system`, key
  `DeviceInfoCfg`; other versions and tools put the same keys into annotations of the Node
  ("Ascend Device Plugin" in the reference of MindCluster, section "Chip Resources");
* conditions of the Node, `status.conditions`: the kubelet's, and those of node-problem-detector
  and NVSentinel;
* taints of the Node, `spec.taints`.

Conditions and taints do not name a device: they hold for all ranks of the Node, as one signal.
Conditions only say that something is worth a look, so they are watched, unless the policy gives one
of them another level (`[codes]`). A taint that the pod tolerates is none of our business.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from revivemoe.health.tolerations import tolerated_s
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport

SOURCE = "kubernetes"

ASCEND_LEVELS: dict[str, int] = {
    "NotHandleFault": 1,
    "NotHandle": 1,
    "RestartRequest": 2,
    "SubHealthFault": 2,
    "RestartBusiness": 3,
    "FreeRestartNPU": 4,
    "PreSeparateNPU": 4,
    "RestartNPU": 5,
    "SeparateNPU": 6,
    "Separate": 6,
    "ManuallySeparateNPU": 6,
}
UNKNOWN_ASCEND_LEVEL = 2
"""A name that the table lacks: watch it, and say so."""
UNHEALTHY_LEVEL = 4
"""A chip in `...-Unhealthy` or `...-NetworkUnhealthy`, or a `NodeUnhealthy` fault, for which no
level is given: nothing is scheduled there any more, so drain."""

CONDITION_LEVEL = 2
CONDITIONS = frozenset(
    (
        # the kubelet's: they tell of the host's software, and ranks have heartbeats of their own
        "MemoryPressure",
        "DiskPressure",
        "PIDPressure",
        "NetworkUnavailable",
        # node-problem-detector's
        "ReadonlyFilesystem",
        "KernelDeadlock",
        "GpuUnhealthy",
        "XidCriticalError",
        # NVSentinel's
        "GpuPowerWatch",
        "GpuThermalWatch",
        "GpuMemWatch",
        "GpuNvlinkWatch",
        "GpuXidError",
        "SysLogsXIDError",
        "SysLogsSXIDError",
        "SysLogsGPUFallenOff",
    )
)
"""Types of which status True is bad. Others are left alone: True may be good (`Ready`)."""
NOT_READY_LEVEL = 2
"""`Ready` False or Unknown: the kubelet is silent, which says nothing yet about a device."""

TAINT_LEVELS: dict[str, int] = {
    "node.kubernetes.io/unschedulable": 1,
    "node.kubernetes.io/not-ready": 4,
    "node.kubernetes.io/unreachable": 4,
    "nvidia.com/gpu-unhealthy": 4,
    "node.kubernetes.io/out-of-service": 6,
}
"""Key of a taint. `out-of-service` is set by hand, for a node that is shut down for good."""
NO_EXECUTE_LEVEL = 4
"""Any other taint with the effect NoExecute: pods are being evicted, so drain."""
TOLERATED_LEVEL = 2
"""A taint that the pod tolerates for some time: it is to go later, so watch it."""

MAX_CODES = 64
"""Fault codes taken from one entry."""
MAX_DETAIL = 200
"""Characters of foreign text in one report."""


@dataclass(frozen=True)
class Ranks:
    """Which ranks a Node and its devices carry."""

    of_device: Mapping[int, Sequence[RankId]]
    """Physical index of a device on the Node: the number at the end of `Ascend910-3`."""

    @property
    def all(self) -> tuple[RankId, ...]:
        return tuple(sorted({rank for ranks in self.of_device.values() for rank in ranks}))


@dataclass
class Reading:
    """Reports, and complaints about what could not be understood (one line each)."""

    ranks: Ranks
    reports: list[DeviceReport] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def reports_of(
    node: Mapping[str, object],
    ranks: Ranks,
    device_info: Mapping[str, object] | None = None,
    pod: Mapping[str, object] | None = None,
) -> Reading:
    """All that a Node object, and its device plugin's ConfigMap, say is wrong now. `pod`: the one
    that the ranks run in, for its tolerations; without it nothing counts as tolerated.

    All as the API's JSON. Whatever has another form than expected becomes a complaint; nothing
    is raised.
    """
    reading = Reading(ranks)
    annotations = _mapping(_mapping(node.get("metadata")).get("annotations"))
    _ascend(annotations, reading)
    if device_info is not None:
        data = _mapping(device_info.get("data"))
        _ascend(_device_list(data, reading), reading)
        _chips(data.get("ManuallySeparateNPU"), 6, "ManuallySeparateNPU", reading)
    _conditions(_mapping(node.get("status")).get("conditions"), reading)
    tolerations = _mapping(_mapping(pod).get("spec")).get("tolerations")
    _taints(node, list(_mappings(tolerations)), reading)
    return reading


def has_taints(node: Mapping[str, object]) -> bool:
    """Whether any taint of the Node means something, unless the pod tolerates it."""
    return any(level for _, level in _taints_of(node))


def _device_list(data: Mapping[str, object], reading: Reading) -> Mapping[str, object]:
    """`{"DeviceInfo": {"DeviceList": {"huawei.com/Ascend910-Fault": ...}}}`, inside a string."""
    text = data.get("DeviceInfoCfg")
    if text is None:
        return {}
    config = _mapping(_json(text, "DeviceInfoCfg", reading))
    return _mapping(_mapping(config.get("DeviceInfo")).get("DeviceList"))


def _ascend(values: Mapping[str, object], reading: Reading) -> None:
    """Faults first: a chip that has one is in `-Unhealthy` too, and needs no second report."""
    ours = {key: text for key, text in values.items() if str(key).startswith("huawei.com/")}
    explained: set[str] = set()
    for key, text in ours.items():
        if key.endswith("-Fault"):
            entries = _json(text, key, reading)
            if not isinstance(entries, list):
                _complain(reading, f"{key} is no JSON list")
                continue
            for entry in entries:
                explained.add(str(_mapping(entry).get("npu_name")))
                _fault(_mapping(entry), key, reading)
    for key, text in ours.items():
        if key.endswith(("-Unhealthy", "-NetworkUnhealthy")):
            code = key.rpartition("-")[2]
            _chips(text, UNHEALTHY_LEVEL, code, reading, but=explained)


def _fault(entry: Mapping[str, object], key: str, reading: Reading) -> None:
    """One entry of the list; one report per fault code and rank.

    `fault_time_and_level_map`, where there is one, gives each code a level of its own. Of the
    three names of the entry's own level the manual recommends the first.
    """
    name = str(entry.get("npu_name") or "")
    hit = _ranks_of_chip(name, reading) if name else reading.ranks.all
    names = (entry.get(f) for f in ("fault_handling", "fault_level", "large_model_fault_level"))
    general = next((n for n in names if n), None)
    levels = _mapping(entry.get("fault_time_and_level_map"))
    kind = str(entry.get("fault_type") or "fault")
    codes = [c.strip() for c in str(entry.get("fault_code") or "").split(",") if c.strip()]
    if not codes and not general:
        _complain(reading, f"{key} has an entry without a fault code and level")
        return
    for code in codes[:MAX_CODES] or [kind]:
        handling = _mapping(levels.get(code)).get("fault_level") or general
        level = _ascend_level(handling, reading)
        _add(reading, hit, level, code, f"{name or 'node'} {kind} {handling or 'no level'}")


def _ascend_level(handling: object, reading: Reading) -> int:
    if not handling:
        return UNHEALTHY_LEVEL
    level = ASCEND_LEVELS.get(handling) if isinstance(handling, str) else None
    if level is None:
        _complain(reading, f"fault level {handling!r} is unknown: taken as L{UNKNOWN_ASCEND_LEVEL}")
        return UNKNOWN_ASCEND_LEVEL
    return level


def _chips(text: object, level: int, code: str, reading: Reading, but: Iterable[str] = ()) -> None:
    """A list such as `Ascend910-0,Ascend910-4`: one report for each chip that is not in `but`."""
    for name in (part.strip() for part in str(text or "").split(",")):
        if name and name not in but:
            _add(reading, _ranks_of_chip(name, reading), level, code, f"{name} is {code}")


def _ranks_of_chip(name: str, reading: Reading) -> Sequence[RankId]:
    """`Ascend910-3`: device 3. A chip that carries no rank is none of our business."""
    index = name.rpartition("-")[2]
    if not (index.isascii() and index.isdigit() and len(index) < 10):
        _complain(reading, f"chip name {name!r} does not end in a number")
        return ()
    return reading.ranks.of_device.get(int(index), ())


def _conditions(conditions: object, reading: Reading) -> None:
    for condition in _mappings(conditions):
        kind, status = str(condition.get("type")), condition.get("status")
        if kind == "Ready":
            level = NOT_READY_LEVEL if status in ("False", "Unknown") else 0
        else:
            level = CONDITION_LEVEL if kind in CONDITIONS and status == "True" else 0
        if level:
            said = f"{condition.get('reason') or ''} {condition.get('message') or ''}"
            _add(
                reading,
                reading.ranks.all,
                level,
                kind,
                f"node condition {kind} is {status}: {said}",
            )


def _taints(
    node: Mapping[str, object], tolerations: Sequence[Mapping[str, object]], reading: Reading
) -> None:
    for taint, level in _taints_of(node):
        key, said = str(taint.get("key")), f"node taint {taint.get('key')}:{taint.get('effect')}"
        stays_s = tolerated_s(taint, tolerations)
        if stays_s and level > TOLERATED_LEVEL:
            level, said = TOLERATED_LEVEL, f"{said}, which the pod tolerates for {stays_s:.0f} s"
        if level and stays_s < float("inf"):
            _add(reading, reading.ranks.all, level, key, said)


def _taints_of(node: Mapping[str, object]) -> Iterator[tuple[Mapping[str, object], int]]:
    """Each with its level; 0: it says nothing to those who run there already."""
    for taint in _mappings(_mapping(node.get("spec")).get("taints")):
        other = NO_EXECUTE_LEVEL if taint.get("effect") == "NoExecute" else 0
        yield taint, TAINT_LEVELS.get(str(taint.get("key")), other)


def _add(reading: Reading, ranks: Sequence[RankId], level: int, code: str, detail: str) -> None:
    told = (level, code[:MAX_DETAIL], " ".join(detail.split())[:MAX_DETAIL], SOURCE)
    shared = tuple(ranks) if len(ranks) > 1 else ()
    reading.reports += [DeviceReport(rank, *told, shared) for rank in ranks]


def _complain(reading: Reading, line: str) -> None:
    reading.complaints.append(" ".join(line.split())[:MAX_DETAIL])


def _json(text: object, key: str, reading: Reading) -> object:
    try:
        return json.loads(cast(str, text))  # anything else is a TypeError
    except (ValueError, TypeError, RecursionError) as error:
        _complain(reading, f"{key} is not JSON: {error}")
        return []


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _mappings(values: object) -> Iterator[Mapping[str, object]]:
    if isinstance(values, list):
        yield from (value for value in values if isinstance(value, Mapping))
