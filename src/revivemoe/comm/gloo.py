"""gloo: across hosts, or where several ranks share one GPU. Tensors are staged through the host."""

from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from revivemoe.comm.group import Graveyard, GroupTransport, build_bounded, bury_in
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId


def connect(store_address: str, epoch: Epoch, timeout_s: float, channel: int = 0) -> PrefixStore:
    """A client of the engine's store under the prefix of this channel of the epoch.

    One client per epoch: a client serves one request at a time, and one that an older epoch has
    left waiting would hold up the next. Raises RuntimeError; blocks up to `timeout_s` seconds.
    """
    host, _, port = store_address.rpartition(":")
    store = TCPStore(
        host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )  # fmt: skip
    return PrefixStore(f"epoch/{epoch}/{channel}", store)


def gloo_transport(
    store_address: str,
    waiter: Waiter,
    epoch: Epoch,
    members: tuple[RankId, ...],
    me: RankId,
    timeout_s: float,
    graveyard: Graveyard,
    *,
    pin: bool = False,
    channel: int = 0,
) -> GroupTransport:
    """Build the group of `epoch`. Raises DomainLeft or CommunicationFailed; never blocks longer
    than `timeout_s`. `pin`: page-lock the host buffers, for payloads that live on a GPU.
    """

    def build() -> ProcessGroupGloo:
        store = connect(store_address, epoch, timeout_s, channel)
        index, timeout = members.index(me), timedelta(seconds=timeout_s)
        return ProcessGroupGloo(store, index, len(members), timeout)

    group = build_bounded(build, waiter, members, me)
    leave = bury_in(graveyard, timeout_s)
    device = torch.device("cpu")
    return GroupTransport(group, waiter, epoch, members, me, device, pin=pin, leave=leave)
