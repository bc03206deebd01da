"""Which sources `serve`'s flags lead to."""

import subprocess
import sys
from pathlib import Path

import pytest

from revivemoe import config
from revivemoe.health.kubernetes import KubernetesSource
from revivemoe.health.nvml import NvmlSource
from revivemoe.health.sources import by_index, sources_for
from revivemoe.ids import RankId

CUDA = {RankId(n): f"cuda:{n % 2}" for n in range(4)}
CPU = {RankId(n): "cpu" for n in range(2)}

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster around, no kubeconfig, all GPUs visible."""
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    use_kubeconfig(monkeypatch, tmp_path / "none")


def use_kubeconfig(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The client reads KUBECONFIG when it is imported."""
    loader = pytest.importorskip("kubernetes.config.kube_config")
    monkeypatch.setattr(loader, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))


def test_nothing_to_watch() -> None:
    assert sources_for("cpu", CPU, None, "auto") == []
    assert sources_for("cuda", CUDA, None, "off") == []


def test_cuda_devices_are_watched_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pynvml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-x")
    (source,) = sources_for("cuda", CUDA, None, "auto")
    assert isinstance(source, NvmlSource)
    assert source._ranks_of_device == {5: (0, 2), "GPU-x": (1, 3)}


def test_without_the_library_health_is_unknown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert sources_for("cuda", CUDA, None, "auto") == []
    assert "revivemoe[nvidia]" in caplog.text


def test_a_node_from_the_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG)
    use_kubeconfig(monkeypatch, path)
    (source,) = sources_for("cpu", CPU, "worker-1", "off")
    assert isinstance(source, KubernetesSource)
    assert source._api.api_client.configuration.host == "http://127.0.0.1:1"
    source.close()


def test_a_node_without_a_cluster_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="neither a service account nor a kubeconfig"):
        sources_for("cpu", CPU, "worker-1", "off")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError, match=r"revivemoe\[kubernetes\]"):
        sources_for("cpu", CPU, "worker-1", "off")


def test_ranks_by_the_number_of_their_device() -> None:
    assert by_index(CUDA) == {0: [0, 2], 1: [1, 3]}
    assert by_index(CPU) == {0: [0], 1: [1]}
    assert by_index({RankId(3): "npu:7", RankId(1): "npu:7"}) == {7: [1, 3]}


def test_neither_torch_nor_a_client_is_loaded_before_it_is_needed() -> None:
    code = (
        "import sys, revivemoe.health.sources, revivemoe.health.monitor;"
        "print(*(m for m in ('torch', 'kubernetes', 'pynvml') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_the_pod_that_this_runs_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "SERVICE_ACCOUNT", tmp_path)
    for name in ("POD_NAME", "POD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOSTNAME", "moe-0")
    assert config.this_pod() is None
    (tmp_path / "namespace").write_text("serving\n")
    assert config.this_pod() == ("serving", "moe-0")
    monkeypatch.setenv("POD_NAME", "moe-1")
    monkeypatch.setenv("POD_NAMESPACE", "other")
    assert config.this_pod() == ("other", "moe-1")
