"""The official client against a server that answers as the API server does."""

import contextlib
import copy
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from unit.health.test_kubernetes_state import CONFIG_MAP, FROM_DEVICE_LIST, HEALTHY, RANKS

from revivemoe.health import kubernetes as kubernetes_module
from revivemoe.health.kubernetes import KubernetesSource, Refused, connect
from revivemoe.health.monitor import HealthMonitor
from revivemoe.recovery.faults import DeviceReport

pytest.importorskip("kubernetes")
from kubernetes.client import Configuration

NODE_PATH = "/api/v1/nodes/worker-1"
MAP_PATH = "/api/v1/namespaces/kube-system/configmaps/mindx-dl-deviceinfo-worker-1"

HANG_UP = 0
"""Instead of a status: the connection is closed without an answer."""


def status(code: int, reason: str) -> dict[str, Any]:
    """The body of a refusal."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
    }


class ApiServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[int, Any]] = {NODE_PATH: (200, copy.deepcopy(HEALTHY))}
        self.asked: list[str] = []
        self.delay_s = 0.0

    @property
    def node(self) -> Any:
        return self.objects[NODE_PATH][1]


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        time.sleep(self.server.delay_s)
        code, body = self.server.objects.get(self.path, (404, status(404, "NotFound")))
        if code == HANG_UP:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has given up
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(5.0)


@pytest.fixture
def source(server: ApiServer) -> Iterator[KubernetesSource]:
    host, port = server.server_address[:2]
    configuration = Configuration(host=f"http://{host!s}:{port}")
    source = KubernetesSource(connect(configuration), "worker-1", RANKS)
    yield source
    source.close()


def levels(reports: list[DeviceReport]) -> set[tuple[int, str, int]]:
    return {(int(r.rank), r.code, r.level) for r in reports}


def test_a_fault_comes_is_reported_once_and_goes(
    server: ApiServer, source: KubernetesSource
) -> None:
    assert source.poll() == []
    assert server.asked == [NODE_PATH, MAP_PATH]
    server.node["status"]["conditions"][-1] = {"type": "Ready", "status": "Unknown"}
    assert levels(source.poll()) == {(r, "Ready", 2) for r in range(4)}
    assert source.poll() == []
    server.node["spec"]["taints"].append(
        {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": "2026-01-01"}
    )
    assert levels(source.poll()) == {(r, "node.kubernetes.io/unreachable", 4) for r in range(4)}
    server.objects[NODE_PATH] = (200, HEALTHY)
    gone = {(r, code, 0) for r in range(4) for code in ("Ready", "node.kubernetes.io/unreachable")}
    assert levels(source.poll()) == gone


def test_the_config_map_of_the_device_plugin(server: ApiServer, source: KubernetesSource) -> None:
    server.objects[MAP_PATH] = (200, CONFIG_MAP)
    assert levels(source.poll()) == FROM_DEVICE_LIST
    del server.objects[MAP_PATH]
    assert levels(source.poll()) == {(rank, code, 0) for rank, code, _ in FROM_DEVICE_LIST}


POD_PATH = "/api/v1/namespaces/serving/pods/moe-0"


def test_its_own_pods_tolerations_are_read_while_there_are_taints(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = server.server_address[:2]
    api = connect(Configuration(host=f"http://{host!s}:{port}"))
    source = KubernetesSource(api, "worker-1", RANKS, ("serving", "moe-0"))
    assert source.poll() == []
    assert POD_PATH not in server.asked, "its taint means nothing to us"
    server.node["spec"]["taints"].append({"key": "a.b/c", "effect": "NoExecute"})
    assert levels(source.poll()) == {(r, "a.b/c", 4) for r in range(4)}
    (line,) = caplog.messages
    assert "cannot read its own Pod serving/moe-0" in line
    body = {"spec": {"tolerations": [{"key": "a.b/c", "operator": "Exists"}]}}
    server.objects[POD_PATH] = (200, body)
    assert levels(source.poll()) == {(r, "a.b/c", 0) for r in range(4)}
    server.objects[POD_PATH] = (500, status(500, "Refused"))
    with pytest.raises(Refused, match="moe-0"):
        source.poll()
    source.close()


def test_a_config_map_that_may_not_be_read_is_said_once(
    server: ApiServer, source: KubernetesSource, caplog: pytest.LogCaptureFixture
) -> None:
    server.objects[MAP_PATH] = (403, status(403, "Forbidden"))
    assert source.poll() == source.poll() == []
    (line,) = caplog.messages
    assert "may not read ConfigMap kube-system/mindx-dl-deviceinfo-worker-1" in line


def test_a_malformed_annotation_is_a_log_line_each_time_it_comes(
    server: ApiServer, source: KubernetesSource, caplog: pytest.LogCaptureFixture
) -> None:
    annotations = server.node["metadata"]["annotations"]
    for _ in range(2):
        annotations["huawei.com/Ascend910-Fault"] = '[{"npu_name"'
        assert source.poll() == source.poll() == []
        annotations["huawei.com/Ascend910-Fault"] = "[]"
        assert source.poll() == []
    assert len(caplog.messages) == 2
    assert "node worker-1: huawei.com/Ascend910-Fault is not JSON" in caplog.messages[0]


@pytest.mark.parametrize("code", [401, 403, 404, 500, 503])
def test_a_node_that_cannot_be_read_is_no_news(
    server: ApiServer, source: KubernetesSource, code: int
) -> None:
    server.node["status"]["conditions"][-1]["status"] = "False"
    assert source.poll()
    good = server.objects[NODE_PATH]
    server.objects[NODE_PATH] = (code, status(code, "Refused"))
    asked = len(server.asked)
    with pytest.raises(Refused, match=f"worker-1: the API server says {code}"):
        source.poll()
    assert len(server.asked) == asked + 1, "the client does not try again by itself"
    server.objects[NODE_PATH] = good
    assert source.poll() == [], "nothing was forgotten and nothing cleared"


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"<html>", "Expecting value"), (b"[]", "sent list"), (b"\xff", "can't decode")],
)
def test_an_answer_that_is_no_object(
    server: ApiServer, source: KubernetesSource, body: bytes, said: str
) -> None:
    server.objects[NODE_PATH] = (200, body)
    with pytest.raises(ValueError, match=said):
        source.poll()


def test_a_broken_connection_is_one_try(server: ApiServer, source: KubernetesSource) -> None:
    server.objects[NODE_PATH] = (HANG_UP, None)
    with pytest.raises(Exception, match="Connection aborted"):
        source.poll()
    assert server.asked == [NODE_PATH]


def test_a_server_that_hangs_is_given_up(
    server: ApiServer, source: KubernetesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_module, "REQUEST_TIMEOUT_S", (0.2, 0.2))
    server.delay_s = 1.0
    began = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        source.poll()
    assert time.monotonic() - began < 0.9


def test_through_the_monitor_and_an_outage(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "revivemoe.health")
    server.objects[NODE_PATH] = (503, status(503, "ServiceUnavailable"))
    host, port = server.server_address[:2]
    source = KubernetesSource(
        connect(Configuration(host=f"http://{host!s}:{port}")), "worker-1", RANKS
    )
    arrived = threading.Event()
    with HealthMonitor([source], lambda report: arrived.set(), interval_s=0.02):
        deadline = time.monotonic() + 10
        while len(server.asked) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        node = copy.deepcopy(HEALTHY)
        node["status"]["conditions"].append({"type": "GpuUnhealthy", "status": "True"})
        server.objects[NODE_PATH] = (200, node)
        assert arrived.wait(10)
    assert "worker-1: the API server says 503" in caplog.messages[0]
    assert "answers again" in caplog.messages[-1]
