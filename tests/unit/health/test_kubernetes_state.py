"""Recorded forms of Nodes and of the device plugin's ConfigMap, through the pure parser."""

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest

from revivemoe.health.kubernetes_state import ASCEND_LEVELS, Ranks, Reading, reports_of
from revivemoe.ids import RankId

RANKS = Ranks({0: [RankId(0)], 1: [RankId(1)], 4: [RankId(2), RankId(3)]})

HEALTHY: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "worker-1",
        "annotations": {
            "node.alpha.kubernetes.io/ttl": "0",
            "huawei.com/Ascend910-Fault": "[]",
            "huawei.com/Ascend910-Unhealthy": "",
        },
    },
    "spec": {
        "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
    },
    "status": {
        "conditions": [
            {"type": "MemoryPressure", "status": "False", "reason": "KubeletHasSufficientMemory"},
            {"type": "KernelDeadlock", "status": "False", "reason": "KernelHasNoDeadlock"},
            {"type": "GpuNvlinkWatch", "status": "False", "reason": "GpuNvlinkWatchIsHealthy"},
            {"type": "SomebodysOwn", "status": "True"},
            {"type": "Ready", "status": "True", "reason": "KubeletReady"},
        ]
    },
}

# As `kubectl get cm -n kube-system mindx-dl-deviceinfo-NODE -o json` shows it for an Atlas A3
# ("Fault Information" in the manual of MindCluster).
DEVICE_LIST = {
    "huawei.com/Ascend910": "Ascend910-0,Ascend910-1,Ascend910-2",
    "huawei.com/Ascend910-Fault": json.dumps(
        [
            {
                "fault_type": "CardNetworkUnhealthy",
                "npu_name": "Ascend910-0",
                "large_model_fault_level": "PreSeparateNPU",
                "fault_level": "PreSeparateNPU",
                "fault_handling": "PreSeparateNPU",
                "fault_code": "81078603",
                "fault_time_and_level_map": {
                    "81078603": {"fault_time": 1744168468259, "fault_level": "PreSeparateNPU"}
                },
            },
            {
                "fault_type": "CardUnhealthy",
                "npu_name": "Ascend910-4",
                "large_model_fault_level": "SeparateNPU",
                "fault_level": "SeparateNPU",
                "fault_handling": "SeparateNPU",
                "fault_code": "A8028801,80E18401",
                "fault_time_and_level_map": {
                    "80E18401": {"fault_time": 1744167455784, "fault_level": "NotHandleFault"},
                    "A8028801": {"fault_time": 1744167455784, "fault_level": "SeparateNPU"},
                },
            },
        ]
    ),
    "huawei.com/Ascend910-NetworkUnhealthy": "Ascend910-0",
    "huawei.com/Ascend910-Recovering": "",
    "huawei.com/Ascend910-Unhealthy": "Ascend910-4",
}
CONFIG_MAP = {
    "kind": "ConfigMap",
    "data": {
        "DeviceInfoCfg": json.dumps(
            {
                "DeviceInfo": {"DeviceList": DEVICE_LIST, "UpdateTime": 1744182144},
                "SuperPodID": 0,
                "ServerIndex": 0,
                "CheckCode": "4f00",
            }
        ),
        "ManuallySeparateNPU": "",
        "SwitchInfoCfg": "{}",
    },
}


def annotated(**annotations: str) -> dict[str, Any]:
    return {"metadata": {"annotations": {f"huawei.com/{k}": v for k, v in annotations.items()}}}


def found(reading: Reading) -> set[tuple[int, str, int]]:
    assert all(r.source == "kubernetes" for r in reading.reports)
    return {(int(r.rank), r.code, r.level) for r in reading.reports}


FROM_DEVICE_LIST = {
    (0, "81078603", 4),
    (2, "A8028801", 6),
    (3, "A8028801", 6),
    (2, "80E18401", 1),
    (3, "80E18401", 1),
}


def test_a_healthy_node_says_nothing() -> None:
    assert reports_of(HEALTHY, RANKS) == Reading(RANKS)
    assert reports_of({}, RANKS, {}) == Reading(RANKS)


def test_faults_in_the_config_map_of_the_device_plugin() -> None:
    reading = reports_of(HEALTHY, RANKS, CONFIG_MAP)
    assert found(reading) == FROM_DEVICE_LIST
    assert reading.complaints == []
    (worst,) = (r for r in reading.reports if r.rank == 2 and r.level == 6)
    assert worst.detail == "Ascend910-4 CardUnhealthy SeparateNPU"


def test_the_same_keys_as_annotations_of_the_node() -> None:
    assert found(reports_of({"metadata": {"annotations": DEVICE_LIST}}, RANKS)) == FROM_DEVICE_LIST


@pytest.mark.parametrize(("name", "level"), ASCEND_LEVELS.items())
def test_each_level_by_its_name(name: str, level: int) -> None:
    entry = {"fault_type": "CardUnhealthy", "npu_name": "Ascend910-1", "fault_code": "80E18005"}
    for field in ("fault_handling", "fault_level", "large_model_fault_level"):
        node = annotated(**{"Ascend910-Fault": json.dumps([entry | {field: name}])})
        assert found(reports_of(node, RANKS)) == {(1, "80E18005", level)}


def test_fault_handling_is_the_name_that_counts() -> None:
    entry = {
        "npu_name": "Ascend910-1",
        "fault_code": "A,B",
        "fault_handling": "RestartRequest",
        "fault_level": "SeparateNPU",
        "large_model_fault_level": "RestartNPU",
    }
    node = annotated(**{"Ascend910-Fault": json.dumps([entry])})
    assert found(reports_of(node, RANKS)) == {(1, "A", 2), (1, "B", 2)}


def test_an_unknown_level_is_watched_and_said() -> None:
    entry = {"npu_name": "Ascend910-1", "fault_code": "A", "fault_handling": "ExplodeNPU"}
    reading = reports_of(annotated(**{"Ascend910-Fault": json.dumps([entry])}), RANKS)
    assert found(reading) == {(1, "A", 2)}
    assert reading.complaints == ["fault level 'ExplodeNPU' is unknown: taken as L2"]


@pytest.mark.parametrize("thing", [3, True, ["SeparateNPU"], {"level": "SeparateNPU"}, "L\n6"])
def test_a_level_of_another_form_is_watched_and_said(thing: Any) -> None:
    """A list where a name belongs raised TypeError, and the whole Node went unread."""
    for part in (
        {"fault_handling": thing},
        {"fault_time_and_level_map": {"A": {"fault_level": thing}}},
    ):
        entry = {"npu_name": "Ascend910-1", "fault_code": "A", "fault_handling": "NotHandle"} | part
        reading = reports_of(annotated(**{"Ascend910-Fault": json.dumps([entry])}), RANKS)
        assert found(reading) == {(1, "A", 2)}
        assert "is unknown: taken as L2" in reading.complaints[0]


@pytest.mark.parametrize("thing", [3, True, ["x"], {"a": 1}, None, 1.5])
@pytest.mark.parametrize(
    "name", ["npu_name", "fault_code", "fault_type", "fault_level", "fault_time_and_level_map"]
)
def test_no_field_of_another_form_raises(name: str, thing: Any) -> None:
    entry = {"npu_name": "Ascend910-1", "fault_code": "A", "fault_level": "NotHandle"} | {
        name: thing
    }
    reports_of(annotated(**{"Ascend910-Fault": json.dumps([entry])}), RANKS)
    node = {
        "status": {
            "conditions": [
                {"type": thing, "status": thing, "reason": thing},
                {"type": "Ready", "status": thing},
            ]
        },
        "spec": {"taints": [{"key": thing, "effect": thing, "value": thing}]},
    }
    reports_of(node, RANKS, {"data": {"ManuallySeparateNPU": thing}})
    reports_of(
        {
            "metadata": {
                "annotations": {"huawei.com/x-Unhealthy": thing, "huawei.com/x-Fault": thing}
            }
        },
        RANKS,
    )


def test_a_node_fault_holds_for_all_ranks() -> None:
    entry = {
        "fault_type": "NodeUnhealthy",
        "npu_name": "",
        "fault_handling": "",
        "fault_code": "heartbeatTimeOut",
    }
    node = annotated(**{"Ascend910-Fault": json.dumps([entry])})
    assert found(reports_of(node, RANKS)) == {(r, "heartbeatTimeOut", 4) for r in range(4)}


def test_lists_of_unhealthy_chips() -> None:
    node = annotated(**{"npu-Unhealthy": "npu-1, npu-7", "npu-NetworkUnhealthy": "npu-0"})
    config_map = {"data": {"ManuallySeparateNPU": "Ascend910-0"}}
    assert found(reports_of(node, RANKS, config_map)) == {
        (1, "Unhealthy", 4),
        (0, "NetworkUnhealthy", 4),
        (0, "ManuallySeparateNPU", 6),
    }


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Whatever a collection calls would fail deep in a recursion, and be laid to the test."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    "text",
    [
        "[{",
        "{}",
        "3",
        "null",
        "[" * 100_000,
        "[3]",
        "[[]]",
        "[{}]",
        '[{"npu_name": 3}]',
        '[{"npu_name": "Ascend910-x", "fault_code": "A"}]',
        '[{"npu_name": "Ascend910-\\u00b2", "fault_code": "A"}]',
    ],
)
def test_what_is_malformed_is_a_complaint(text: str) -> None:
    node = annotated(**{"Ascend910-Fault": text, "Ascend910-Unhealthy": "Ascend910-1"})
    reading = reports_of(node, RANKS)
    assert found(reading) == {(1, "Unhealthy", 4)}, "the rest is still read"
    (line,) = reading.complaints
    assert "\n" not in line
    assert len(line) <= 200


@pytest.mark.parametrize("text", ["{", "[]", '{"DeviceInfo": 3}', '{"DeviceInfo": {}}', 7])
def test_a_malformed_config_map_raises_nothing(text: Any) -> None:
    assert reports_of(HEALTHY, RANKS, {"data": {"DeviceInfoCfg": text}}).reports == []


@pytest.mark.parametrize("thing", [None, 3, "x", [], [3, None], {}])
def test_parts_of_another_form_are_passed_over(thing: Any) -> None:
    node = {
        "metadata": {"annotations": thing},
        "status": {"conditions": thing},
        "spec": {"taints": thing},
    }
    assert reports_of(node, RANKS, {"data": thing}).reports == []
    assert reports_of({"metadata": thing, "status": thing, "spec": thing}, RANKS).reports == []


def test_foreign_text_and_lists_are_cut() -> None:
    codes = ",".join(f"C{n}" for n in range(1000))
    entry = {"npu_name": "Ascend910-1", "fault_code": codes, "fault_handling": "RestartNPU"}
    reading = reports_of(annotated(**{"Ascend910-Fault": json.dumps([entry])}), RANKS)
    assert len(reading.reports) == 64
    condition = {"type": "KernelDeadlock", "status": "True", "message": "long\n" * 1000}
    (one, *_) = reports_of({"status": {"conditions": [condition]}}, RANKS).reports
    assert len(one.detail) == 200
    assert "\n" not in one.detail


@pytest.mark.parametrize(
    ("kind", "status", "level"),
    [
        ("Ready", "False", 2),
        ("Ready", "Unknown", 2),
        ("MemoryPressure", "True", 2),
        ("GpuUnhealthy", "True", 2),
        ("XidCriticalError", "True", 2),
        ("GpuNvlinkWatch", "True", 2),
        ("SysLogsGPUFallenOff", "True", 2),
        ("GpuUnhealthy", "Unknown", 0),
    ],
)
def test_conditions_are_watched_and_hold_for_all_ranks(kind: str, status: str, level: int) -> None:
    condition = {"type": kind, "status": status, "reason": "Because", "message": "of this"}
    reading = reports_of({"status": {"conditions": [condition]}}, RANKS)
    assert found(reading) == ({(r, kind, level) for r in range(4)} if level else set())
    assert all(r.detail.endswith("Because of this") for r in reading.reports)
    assert all(r.shared == (0, 1, 2, 3) for r in reading.reports), "one signal"


@pytest.mark.parametrize(
    ("key", "effect", "level"),
    [
        ("node.kubernetes.io/unschedulable", "NoSchedule", 1),
        ("node.kubernetes.io/unreachable", "NoExecute", 4),
        ("node.kubernetes.io/out-of-service", "NoExecute", 6),
        ("nvidia.com/gpu-unhealthy", "NoSchedule", 4),
        ("somebody.io/maintenance", "NoExecute", 4),
        ("somebody.io/maintenance", "NoSchedule", 0),
    ],
)
def test_taints_hold_for_all_ranks(key: str, effect: str, level: int) -> None:
    reading = reports_of({"spec": {"taints": [{"key": key, "effect": effect}]}}, RANKS)
    assert found(reading) == ({(r, key, level) for r in range(4)} if level else set())


def pod(*tolerations: Any) -> dict[str, Any]:
    return {"spec": {"tolerations": list(tolerations)}}


def toleration(key: str | None = None, effect: str | None = None, **more: Any) -> dict[str, Any]:
    given = {"key": key, "effect": effect, **more}
    return {name: value for name, value in given.items() if value is not None}


DRAIN = {"key": "somebody.io/maintenance", "value": "now", "effect": "NoExecute"}


@pytest.mark.parametrize(
    ("given", "level"),
    [
        (toleration(operator="Exists"), 0),
        (toleration("somebody.io/maintenance", operator="Exists"), 0),
        (toleration("somebody.io/maintenance", "NoExecute", operator="Equal", value="now"), 0),
        (toleration("somebody.io/maintenance", value="now"), 0),
        (toleration("somebody.io/maintenance", "NoExecute", value="later"), 4),
        (toleration("somebody.io/maintenance"), 4),
        (toleration("somebody.io/maintenance", "NoSchedule", operator="Exists"), 4),
        (toleration("somebody.io/other", operator="Exists"), 4),
        (toleration("somebody.io/maintenance", operator="Lt", value="now"), 4),
        (toleration(value="now"), 4),
        (toleration(operator="Exists", effect="NoExecute", tolerationSeconds=300), 2),
        (toleration(operator="Exists", effect="NoExecute", tolerationSeconds=0), 4),
        (toleration(operator="Exists", effect="NoExecute", tolerationSeconds=10**400), 2),
        (3, 4),
        (toleration("somebody.io/maintenance", operator=["Exists"], effect={}), 4),
    ],
)
def test_a_taint_that_the_pod_tolerates_is_ignored(given: Any, level: int) -> None:
    """Ranks were drained for a NoExecute taint beside which their pod may run for ever."""
    node = {"spec": {"taints": [DRAIN]}}
    expected = {(r, DRAIN["key"], level) for r in range(4)} if level else set()
    assert found(reports_of(node, RANKS, None, pod(given))) == expected
    both = reports_of(node, RANKS, None, pod(given, toleration("x", operator="Exists")))
    assert found(both) == expected
    assert found(reports_of(node, RANKS)) == {(r, DRAIN["key"], 4) for r in range(4)}


def test_the_first_toleration_that_matches_counts() -> None:
    """As in Kubernetes, which evicts this pod after five minutes."""
    some = toleration("somebody.io/maintenance", operator="Exists", tolerationSeconds=300)
    ever = toleration(operator="Exists")
    for tolerations, level in (((some, ever), 2), ((ever, some), 0)):
        reading = reports_of({"spec": {"taints": [DRAIN]}}, RANKS, None, pod(*tolerations))
        assert {level for _, _, level in found(reading)} == ({level} if level else set())


def test_a_chip_with_a_number_that_none_has() -> None:
    annotations = {"huawei.com/Ascend910-Unhealthy": "Ascend910-" + "1" * 5000}
    reading = reports_of({"metadata": {"annotations": annotations}}, RANKS)
    assert found(reading) == set()
    assert reading.complaints


@pytest.mark.parametrize(
    "thing", [None, 3, "x", [], [3], {}, {"spec": 3}, {"spec": {"tolerations": 3}}]
)
def test_a_pod_of_another_form_tolerates_nothing(thing: Any) -> None:
    reading = reports_of({"spec": {"taints": [DRAIN]}}, RANKS, None, thing)
    assert {level for _, _, level in found(reading)} == {4}


def test_which_ranks_one_signal_speaks_of() -> None:
    reading = reports_of(HEALTHY, RANKS, CONFIG_MAP)
    assert {(int(r.rank), r.shared) for r in reading.reports} == {(0, ()), (2, (2, 3)), (3, (2, 3))}
