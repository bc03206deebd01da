"""NCCL: one GPU per rank. A domain is left by aborting its communicator from a thread."""

from datetime import timedelta

import torch

from revivemoe.comm.gloo import connect
from revivemoe.comm.group import Graveyard, GroupTransport, abort_aside, build_bounded
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

_WATCHDOG_S = 86_400.0
"""The library's own time-out ends the whole process (its watchdog rethrows), so it must never be
the first: our wait gives up much earlier and aborts the communicator itself."""


def nccl_transport(
    store_address: str,
    waiter: Waiter,
    epoch: Epoch,
    members: tuple[RankId, ...],
    me: RankId,
    timeout_s: float,
    graveyard: Graveyard,
    device: torch.device,
    *,
    channel: int = 0,
) -> GroupTransport:
    """Build the group of `epoch` on `device`. Raises DomainLeft or CommunicationFailed."""
    from torch.distributed import ProcessGroupNCCL  # absent from a CPU build

    def build() -> ProcessGroupNCCL:
        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=_WATCHDOG_S)
        store = connect(store_address, epoch, timeout_s, channel)
        group = ProcessGroupNCCL(store, members.index(me), len(members), options)
        group.eager_connect_single_device(device)
        return group

    group = build_bounded(build, waiter, members, me)
    leave = abort_aside(graveyard, timeout_s)
    return GroupTransport(group, waiter, epoch, members, me, device, pin=False, leave=leave)
