"""Which sources an instance gets, from what `serve` was asked for."""

import logging
from collections.abc import Mapping

from revivemoe.config import cuda_device_id, this_pod
from revivemoe.health.kubernetes import KubernetesSource, connect
from revivemoe.health.kubernetes_state import Ranks
from revivemoe.health.nvml import NvmlSource
from revivemoe.health.nvml_library import DeviceId
from revivemoe.health.source import HealthSource
from revivemoe.ids import RankId

log = logging.getLogger("revivemoe.health")


def sources_for(
    device: str,
    rank_devices: Mapping[RankId, str],
    kubernetes_node: str | None,
    device_health: str,
) -> list[HealthSource]:
    """Sources to hand to a `HealthMonitor`; nothing is opened or asked before its first poll.

    `device` is `cpu` or `cuda`, `rank_devices` each rank's (`cuda:1`, `npu:3`, `cpu`). The
    Kubernetes client reads its configuration here. Raises ValueError if a Node was asked for and
    cannot be.
    """
    sources: list[HealthSource] = []
    if device_health == "auto" and device == "cuda":
        sources += nvml_sources(rank_devices)
    if kubernetes_node is not None:
        api = connect()
        ranks = Ranks(by_index(rank_devices))
        sources.append(KubernetesSource(api, kubernetes_node, ranks, this_pod()))
    return sources


def nvml_sources(rank_devices: Mapping[RankId, str]) -> list[HealthSource]:
    """One source, or none where `nvidia-ml-py` is not installed: health is then unknown."""
    try:
        import pynvml
    except ImportError:
        log.warning("no device health: pip install 'revivemoe[nvidia]', or --device-health off")
        return []
    ranks_of_device: dict[DeviceId, list[RankId]] = {}
    for index, ranks in by_index(rank_devices).items():
        ranks_of_device.setdefault(cuda_device_id(index), []).extend(ranks)
    return [NvmlSource(pynvml, ranks_of_device)]


def by_index(rank_devices: Mapping[RankId, str]) -> dict[int, list[RankId]]:
    """Ranks by the number of their device. `cpu` has none: there each rank is a device."""
    found: dict[int, list[RankId]] = {}
    for rank, device in sorted(rank_devices.items()):
        number = device.partition(":")[2]
        found.setdefault(int(number) if number else int(rank), []).append(rank)
    return found
