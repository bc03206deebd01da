"""The owner of a process's transport: at most one domain at a time, one per epoch."""

from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup

from revivemoe.comm.fence import DomainLeft, FenceFlag
from revivemoe.comm.gloo import connect, gloo_group
from revivemoe.comm.group import Graveyard, GroupTransport, build_bounded
from revivemoe.comm.nccl import nccl_group
from revivemoe.comm.shm import Segment, ShmTransport
from revivemoe.comm.sockets import connections
from revivemoe.comm.transport import SoloTransport, Transport
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.commands import DomainSpec


class Domains:
    """Enters and leaves the domains of one process. A context manager; leaves at its end.

    Leaving waits for nobody, but an ordinary interpreter exit frees abandoned gloo groups and so
    joins their threads, up to the time-out of the stuck work: a rank should end by `os._exit`.
    """

    def __init__(
        self,
        fence: FenceFlag,
        segment_fd: int | None = None,
        device: torch.device | str = "cpu",
        on_wait: Callable[[bool], None] = lambda waiting: None,
    ) -> None:
        """`segment_fd`: from `create_segment`, needed for shm; it stays the caller's to close.
        `device`: where the payload lives (pinned staging with gloo, the GPU with NCCL).
        `on_wait`: told when a wait for peers begins and ends.
        """
        self._fence = fence
        self._segment = None if segment_fd is None else Segment(segment_fd)
        self._device = torch.device(device)
        self._on_wait = on_wait
        self._graveyard = Graveyard()
        self._last_epoch = -1
        self.current: tuple[Transport, ...] = ()

    def __enter__(self) -> "Domains":
        return self

    def __exit__(self, *raised: object) -> None:
        self.leave()

    def enter(
        self, spec: DomainSpec, epoch: Epoch, members: tuple[RankId, ...], me: RankId
    ) -> tuple[Transport, ...]:
        """Leave the present domain and enter that of `epoch`, higher than any entered before.

        Returns its channels, `spec.channels` of them: independent sequences of exchanges. Raises
        DomainLeft if the epoch is fenced meanwhile, CommunicationFailed if the others do not come
        within `spec.timeout_s`, ValueError for a domain that this process cannot enter.
        """
        self.leave()
        assert epoch > self._last_epoch, f"epoch {epoch} after epoch {self._last_epoch}"
        self._last_epoch = epoch
        self.check_fence(epoch)
        for channel in range(spec.channels):
            self.current += (self._build(spec, epoch, members, me, channel),)
        return self.current

    @property
    def unfreed(self) -> int:
        """Groups that were left, and still have work that has not ended."""
        return len(self._graveyard)

    def check_fence(self, epoch: Epoch) -> None:
        """Raise DomainLeft if `epoch` is fenced: for work before it is entered."""
        if self._fence.covers(epoch):
            raise DomainLeft(f"epoch {epoch} was fenced before it began")

    def leave(self) -> None:
        """Leave the present domain, if any. Waits for nobody."""
        for transport in self.current:
            transport.close()
        self.current = ()

    def _build(
        self, spec: DomainSpec, epoch: Epoch, members: tuple[RankId, ...], me: RankId, channel: int
    ) -> Transport:
        waiter = Waiter(self._fence, epoch, spec.timeout_s, self._on_wait)
        if members == (me,):
            return SoloTransport(waiter, epoch, members, me, self._device)
        if spec.backend == "shm":
            if self._segment is None:
                raise ValueError("the shm transport needs the descriptor of a segment")
            return ShmTransport(self._segment, waiter, epoch, members, me, channel)
        if spec.backend not in ("gloo", "nccl"):
            raise ValueError(f"unknown transport {spec.backend!r}: use shm, gloo or nccl")
        address, gloo = spec.store_address, spec.backend == "gloo"
        if address is None:
            raise ValueError(f"the {spec.backend} transport needs a store_address")

        def build() -> tuple[ProcessGroup, frozenset[int] | None]:
            store = connect(address, epoch, spec.timeout_s, channel)
            place, before = (store, members.index(me), len(members)), connections()
            if not gloo:
                return nccl_group(*place, self._device), None
            return gloo_group(*place, spec.timeout_s), connections() - before

        group, connected = build_bounded(build, waiter, members, me)
        device = torch.device("cpu") if gloo else self._device
        pin, rest = gloo and self._device.type == "cuda", (spec.timeout_s, self._graveyard)
        return GroupTransport(
            group, waiter, epoch, members, me, device, *rest, pin=pin, connections=connected
        )
