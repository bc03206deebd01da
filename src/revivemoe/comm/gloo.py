"""gloo: across hosts, or where several ranks share one GPU. Tensors are staged through the host."""

from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore


def connect(store_address: str, epoch: int, timeout_s: float, channel: int = 0) -> PrefixStore:
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


def gloo_group(store: PrefixStore, index: int, size: int, timeout_s: float) -> ProcessGroupGloo:
    """Blocks up to `timeout_s` seconds for the others. Raises RuntimeError."""
    return ProcessGroupGloo(store, index, size, timedelta(seconds=timeout_s))
