"""NCCL: one GPU per rank. A domain is left by aborting its communicator from a thread."""

from collections.abc import Mapping
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup

SETTINGS: Mapping[str, str] = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Variables, before a process's first group: left to itself torch's watchdog ends whoever has lost
a peer, the survivors, that is."""

_WATCHDOG_S = 86_400.0
"""The library's own time-out ends the whole process (its watchdog rethrows), so it must never be
the first: our wait gives up much earlier and aborts the communicator itself."""


def nccl_group(store: PrefixStore, index: int, size: int, device: torch.device) -> ProcessGroup:
    """Blocks until the others are there, or the store gives up. Raises RuntimeError."""
    from torch.distributed import ProcessGroupNCCL  # absent from a CPU build

    torch.cuda.set_device(device)
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_WATCHDOG_S)
    group = ProcessGroupNCCL(store, index, size, options)
    group.eager_connect_single_device(device)
    return group
