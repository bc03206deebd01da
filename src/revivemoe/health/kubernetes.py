"""Health of one Kubernetes Node, through the official client; what it means: `kubernetes_state`.

The service account needs `get` on that Node, and for Ascend's device plugin `get` on the ConfigMap
`mindx-dl-deviceinfo-NODE` in `kube-system`; without the latter its faults stay unknown. With `get`
on its own Pod it learns which taints of the Node that tolerates; without it, none.
"""

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from revivemoe.health.kubernetes_state import Ranks, has_taints, reports_of
from revivemoe.health.source import Changes
from revivemoe.recovery.faults import DeviceReport

if TYPE_CHECKING:
    from kubernetes.client import Configuration, CoreV1Api
    from urllib3 import HTTPResponse

log = logging.getLogger("revivemoe.health")

REQUEST_TIMEOUT_S = (2.0, 3.0)
"""To connect, and to read."""
DEVICE_INFO_NAMESPACE = "kube-system"
DEVICE_INFO_PREFIX = "mindx-dl-deviceinfo-"


ABSENT, REFUSED = 404, 403


class Refused(OSError):
    """The API server answered, with an error."""

    def __init__(self, name: str, status: int, reason: str) -> None:
        super().__init__(f"{name}: the API server says {status} {reason}")
        self.status = status


class KubernetesSource:
    """Polls one Node. `api` is closed with the source."""

    name = "kubernetes"

    def __init__(
        self, api: "CoreV1Api", node: str, ranks: Ranks, pod: tuple[str, str] | None = None
    ) -> None:
        """`pod`: namespace and name of the one that the ranks run in, if they do."""
        self._api = api
        self._pod = pod
        self._node = node
        self._ranks = ranks
        self._changes = Changes()
        self._complaints: set[str] = set()

    def poll(self) -> list[DeviceReport]:
        """See `HealthSource`. Takes at most three requests of `REQUEST_TIMEOUT_S`.

        Raises `Refused`, the client's errors, or ValueError for a body that is not JSON, if the
        Node cannot be read: no news is neither bad nor good.
        """
        node = self._read(self._api.read_node, self._node)
        complaints: list[str] = []
        device_info = self._device_info(complaints)
        pod = self._own_pod(complaints) if has_taints(node) else None
        reading = reports_of(node, self._ranks, device_info, pod)
        self._say(complaints + reading.complaints)
        return self._changes.to(reading.reports)

    def close(self) -> None:
        self._api.api_client.close()

    def _device_info(self, complaints: list[str]) -> dict[str, object] | None:
        """The device plugin's ConfigMap; None if there is none, or if we may not read it."""
        name = DEVICE_INFO_PREFIX + self._node
        where = (name, DEVICE_INFO_NAMESPACE)
        found = self._read_if_allowed(self._api.read_namespaced_config_map, *where)
        if found == REFUSED:
            complaints.append(f"may not read ConfigMap {DEVICE_INFO_NAMESPACE}/{name}")
        return found if isinstance(found, dict) else None

    def _own_pod(self, complaints: list[str]) -> dict[str, object] | None:
        """The Pod that the ranks run in, for its tolerations."""
        if self._pod is None:
            return None
        namespace, name = self._pod
        found = self._read_if_allowed(self._api.read_namespaced_pod, name, namespace)
        if isinstance(found, dict):
            return found
        complaints.append(
            f"cannot read its own Pod {namespace}/{name}, so no taint counts as tolerated: allow "
            "`get` on pods, and set POD_NAME (and POD_NAMESPACE) through the downward API"
        )
        return None

    def _read_if_allowed(
        self, call: "Callable[..., HTTPResponse]", *names: str
    ) -> dict[str, object] | int:
        """The object; or ABSENT, or REFUSED."""
        try:
            return self._read(call, *names)
        except Refused as error:
            if error.status not in (401, 403, 404):
                raise
            return ABSENT if error.status == 404 else REFUSED

    def _read(self, call: "Callable[..., HTTPResponse]", *names: str) -> dict[str, object]:
        """The object as the API's own JSON: the client's models refuse what they do not know."""
        from kubernetes.client import ApiException

        try:
            response = call(*names, _request_timeout=REQUEST_TIMEOUT_S, _preload_content=False)
        except ApiException as error:
            raise Refused(names[0], error.status, error.reason) from None
        found = json.loads(response.data)
        if not isinstance(found, dict):
            raise ValueError(f"{names[0]}: the server sent {type(found).__name__}, not an object")
        return found

    def _say(self, complaints: list[str]) -> None:
        """Log each complaint when it comes up, and again only after it has been gone."""
        for complaint in complaints:
            if complaint not in self._complaints:
                log.warning("%s: node %s: %s", self.name, self._node, complaint)
        self._complaints = set(complaints)


def connect(configuration: "Configuration | None" = None) -> "CoreV1Api":
    """A CoreV1Api: of this configuration, of the pod this runs in, or of the kubeconfig.

    One try per request: trying again is the monitor's. Raises ValueError.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ValueError(
            "--kubernetes-node needs the Kubernetes client: pip install 'revivemoe[kubernetes]'"
        ) from None
    if configuration is None:
        configuration = client.Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                config.load_kube_config(client_configuration=configuration)
        except Exception as error:  # a kubeconfig may hold anything
            said = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--kubernetes-node found neither a service account nor a kubeconfig: {said}"
            ) from None
    configuration.retries = False
    return client.CoreV1Api(client.ApiClient(configuration))
