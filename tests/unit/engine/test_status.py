"""The status document against its contract: every field, its type, and what it means."""

import json
import types
from typing import Any

import pytest
from unit.control_plane import Instance

from revivemoe.engine.status import status_document
from revivemoe.ids import RankId
from revivemoe.recovery.policy import Policy

WALL = 1_700_000_000.0
NUMBER = float | int

ENGINE = {
    "id": int, "status": str, "roles": list, "logical_rank": int | None, "incarnation": int,
    "pid": int | None, "host": str, "device": str, "running": int, "waiting": int,
    "kv_blocks_used": int, "kv_blocks_total": int, "last_step": int,
    "graphs": str, "recompiled": int,
    "heartbeat_age_s": NUMBER | None, "fault_info": dict | None, "life": dict,
}  # fmt: skip
EXPERTS = {
    "layers": int, "experts_per_layer": int, "slots_per_layer": int, "missing": list,
    "uncovered_by_one_more_fault": int,
}  # fmt: skip
RECOVERY = {
    "epoch": int, "cause": str, "faults": list, "reason": str, "started_at": str, "outcome": str,
    "detect_s": NUMBER, "stall_s": NUMBER | None, "phases": dict, "migrated": int,
    "recomputed_tokens": int, "experts_dropped": int, "experts_reloaded": int,
    "experts_masked": int, "role_switched": int | None, "recompiled": int,
    "restarted": list, "rolled_back": int, "request_id": str | None,
}  # fmt: skip
DOCUMENT = {
    "schema_version": int,
    "state": str,
    "reason": str | None,
    "epoch": int,
    "quality": str,
    "total_engines": int,
    "last_ft_request_id": str | None,
    "engines": list,
    "experts": dict,
    "dense_ffn_groups": list,
    "device_faults_refused": list,
    "obligations": list,
    "recoveries": list,
}
LIFE = {"state": str, "since_s": NUMBER | None, "due_s": NUMBER | None, "waits_for": str}
OBLIGATION = {"what": str, "for": int | str | None, "due_s": NUMBER, "then": str}  # fmt: skip
REFUSED = {
    "ids": list, "source": str, "code": str, "level": int, "action": str, "reason": str,
    "since_s": NUMBER,
}  # fmt: skip
FAULT = {"id": int, "kind": str, "level": int, "detail": str}
PHASES = ["fence", "rollback", "plan", "migrate", "experts", "domain", "graphs", "resume"]
STATUSES = ("healthy", "suspect", "unhealthy", "draining", "joining", "dead")
STATES = ("starting", "serving", "recovering", "paused", "failed")


def check(document: dict[str, Any], schema: dict[str, type | types.UnionType]) -> None:
    assert document.keys() == schema.keys()
    for key, kind in schema.items():
        assert isinstance(document[key], kind), f"{key}: {document[key]!r} is no {kind}"
        assert kind is int or not isinstance(document[key], bool), key


def status(instance: Instance) -> dict[str, Any]:
    """Checked, and passed through JSON as a client would see it."""
    raw = status_document(instance.engine, instance.now, WALL)
    document: dict[str, Any] = json.loads(json.dumps(raw))
    assert document == raw, "something JSON has no form for"
    check(document, DOCUMENT)
    check(document["experts"], EXPERTS)
    for engine in document["engines"]:
        check(engine, ENGINE)
        check(engine["life"], LIFE)
        assert engine["status"] in STATUSES
        if engine["fault_info"] is not None:
            check(engine["fault_info"], FAULT)
    for obligation in document["obligations"]:
        check(obligation, OBLIGATION)
    for refused in document["device_faults_refused"]:
        check(refused, REFUSED)
    for recovery in document["recoveries"]:
        check(recovery, RECOVERY)
        assert list(recovery["phases"]) == PHASES
        assert all(seconds >= 0 for seconds in recovery["phases"].values())
        for fault in recovery["faults"]:
            check(fault, FAULT)
    assert document["schema_version"] == 1
    assert document["state"] in STATES
    assert document["experts"]["missing"] == sorted(document["experts"]["missing"])
    return document


def by_status(document: dict[str, Any]) -> list[str]:
    return [engine["status"] for engine in document["engines"]]


def beat(instance: Instance) -> None:
    for fake in instance.cluster.ranks.values():
        fake.beat()
    instance.deliver()


def test_starting() -> None:
    instance = Instance()
    before = status(instance)
    assert (before["state"], by_status(before)) == ("starting", ["joining"] * 4)
    assert before["engines"][0]["heartbeat_age_s"] is None
    assert before["engines"][0]["pid"] is None
    instance.engine.start(instance.now)
    assert by_status(status(instance)) == ["joining"] * 4


def test_serving() -> None:
    instance = Instance(redundant=4).start()
    instance.submit()
    instance.step()
    beat(instance)
    instance.now += 0.25
    document = status(instance)
    assert (document["state"], document["quality"], document["epoch"]) == ("serving", "full", 1)
    assert document["reason"] is None
    assert document["total_engines"] == 4
    assert [e["id"] for e in document["engines"]] == [0, 1, 2, 3]
    assert [e["logical_rank"] for e in document["engines"]] == [0, 1, 2, 3]
    assert sum(e["running"] for e in document["engines"]) == 1
    first = document["engines"][0]
    assert (first["roles"], first["pid"]) == (["attention", "expert"], 1000)
    assert (first["incarnation"], first["heartbeat_age_s"], first["device"]) == (1, 0.25, "cpu")
    assert (first["kv_blocks_used"], first["kv_blocks_total"]) == (2, 64)
    assert document["experts"] == {
        "layers": 2, "experts_per_layer": 8, "slots_per_layer": 12, "missing": [],
        "uncovered_by_one_more_fault": 4,
    }  # fmt: skip
    assert document["recoveries"] == []


def test_silence_is_shown_and_ends() -> None:
    instance = Instance().start()
    instance.now += 1.5
    assert by_status(status(instance)) == ["suspect"] * 4
    beat(instance)
    assert by_status(status(instance)) == ["healthy"] * 4


def test_recovering_and_recovered() -> None:
    instance = Instance().start()
    for prompt in ((1,), (2,), (3,), (4,), (5,)):
        instance.submit(prompt, max_tokens=20)
    instance.step(3)
    beat(instance)
    instance.now += 0.5
    instance.die(1, deliver=False)
    during = status(instance)
    assert (during["state"], during["epoch"]) == ("recovering", 1)
    assert by_status(during) == ["healthy", "dead", "healthy", "healthy"]
    instance.deliver()
    instance.step()
    instance.now += 60

    document = status(instance)
    assert (document["state"], document["epoch"], document["quality"]) == ("serving", 2, "full")
    assert document["total_engines"] == 4
    assert [e["logical_rank"] for e in document["engines"]] == [0, None, 1, 2]
    dead = document["engines"][1]
    assert (dead["roles"], dead["running"], dead["kv_blocks_used"]) == ([], 0, 0)
    assert dead["fault_info"]["kind"] == "process_exit"
    assert dead["fault_info"]["level"] == 6
    (recovery,) = document["recoveries"]
    assert (recovery["epoch"], recovery["cause"]) == (2, "process_exit")
    assert recovery["outcome"] == "recovered"
    assert recovery["faults"] == [dead["fault_info"]]
    assert recovery["started_at"] == "2023-11-14T22:12:19.990Z", "60.01 s before the wall clock"
    assert recovery["detect_s"] == pytest.approx(0.5)
    assert recovery["stall_s"] == pytest.approx(0.51)
    assert recovery["phases"]["domain"] == 0.25
    assert recovery["phases"]["rollback"] == 0.125
    assert (recovery["migrated"], recovery["recomputed_tokens"]) == (1, 4)
    assert (recovery["experts_dropped"], recovery["experts_masked"]) == (8, 0)
    assert recovery["reason"].startswith("rank 1 lost; every lost expert has a replica")


def test_degraded() -> None:
    instance = Instance(redundant=0, policy=Policy(max_missing_fraction=0.25)).start()
    instance.die(1)
    document = status(instance)
    assert (document["state"], document["quality"]) == ("serving", "degraded")
    assert document["experts"]["missing"] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert document["experts"]["slots_per_layer"] == 6
    assert document["recoveries"][0]["experts_masked"] == 4


def test_failed() -> None:
    instance = Instance(redundant=0, policy=Policy(repair=("mask",))).start()
    instance.die(1)
    document = status(instance)
    assert document["state"] == "failed"
    assert "would be missing" in document["reason"]
    assert document["recoveries"][0]["outcome"] == "failed"


def test_what_one_more_fault_would_cost() -> None:
    instance = Instance(redundant=8).start()
    assert status(instance)["experts"]["uncovered_by_one_more_fault"] == 0
    instance.die(0)
    costs = [
        len(instance.engine.membership.placement.without(frozenset({RankId(r)})).missing)
        for r in (1, 2, 3)
    ]
    assert status(instance)["experts"]["uncovered_by_one_more_fault"] == max(costs)
    assert max(costs) > 0


def test_what_is_outstanding_is_named_with_its_deadline() -> None:
    instance = Instance(policy=Policy(corpse_timeout_s=30)).start()
    assert status(instance)["obligations"] == []
    instance.cluster.ranks[RankId(1)].mute = True
    instance.wait(1.6)
    document = status(instance)
    (owed,) = document["obligations"]
    assert (owed["what"], owed["for"]) == ("condemned", 1)
    assert 29 < owed["due_s"] <= 30
    life = document["engines"][1]["life"]
    assert (life["state"], life["waits_for"]) == ("condemned", "its process to be gone")
    assert document["engines"][0]["life"]["state"] == "member"
    assert document["engines"][0]["life"]["due_s"] is None
