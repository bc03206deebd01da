"""gloo: across hosts, or where several ranks share one GPU. Tensors are staged through the host."""

from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

HERE = "127.0.0.1"
"""All ranks are on this host. Left to itself, gloo asks the resolver for the host's own name, which
may be unknown to it, or take it seconds."""


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
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=HERE)]
    return ProcessGroupGloo(store, index, size, options)
