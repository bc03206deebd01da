"""NCCL: one GPU per rank. A domain is left by aborting its communicator from a thread."""

from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup

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
