"""Dispatch and combine: rows to the ranks that hold their experts, and the partial sums back.

Legend for shapes: T tokens of this rank, K experts per token, H hidden size, N members, S slots
per rank, M rows sent, R rows received. A row is one token on its way to one rank: a token goes to
each rank at most once, however many of its experts are there.

    to the experts   | K slot ids int64, of the domain | K weights float32 | pad | H hidden | pad |
    back             | H partial sum |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revivemoe.comm.rows import Rows, TorchRows
from revivemoe.comm.shm import region_bytes_for, round_up
from revivemoe.comm.transport import Flow, Transport
from revivemoe.kernels.rows import Route, RowLayout

_ALIGN = 16


@dataclass(frozen=True)
class DispatchHandle:
    """What combine needs of the dispatch it answers. Opaque to callers."""

    like: Tensor
    """Of the shape, dtype and device that combine is to return."""
    route: Route | None
    received_N: tuple[int, ...]


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts, by source logical rank and then by the source's token."""

    rows_RH: Tensor
    """Hidden states, the dtype and device they were dispatched with."""
    slot_ids_RK: Tensor
    """int64, this rank's slots; S where that choice is not on this rank."""
    weights_RK: Tensor
    """float32; 0 where that choice is not on this rank."""
    handle: DispatchHandle


@dataclass(frozen=True)
class Sent:
    """Tokens on their way. Opaque to callers."""

    hidden_TH: Tensor
    slot_ids_TK: Tensor
    weights_TK: Tensor
    route: Route | None
    """None in a domain of one."""


def _layout(hidden: int, itemsize: int, top_k: int) -> RowLayout:
    hidden_at = round_up(top_k * (8 + 4), _ALIGN)
    return RowLayout(hidden_at + round_up(hidden * itemsize, _ALIGN), hidden_at, hidden, top_k)


def region_bytes(num_ranks: int, max_tokens: int, hidden: int, itemsize: int, top_k: int) -> int:
    """Size of a rank's shared-memory region, bytes, such that no exchange can exceed it.

    `max_tokens` is the most tokens that any rank runs in one step. A rank sends each of its tokens
    to at most min(N, K) ranks, and returns at most one sum, float32 or float64, for each token of
    each rank.
    """
    out = max_tokens * min(num_ranks, top_k) * _layout(hidden, itemsize, top_k).row_bytes
    back = max_tokens * num_ranks * hidden * 8
    return region_bytes_for(num_ranks, max(out, back))


class Dispatcher:
    """Dispatch and combine over one channel of an epoch's domain. Collective: all members call
    alike. Sources (who have tokens) send to servers (who hold what the tokens ask for), and get
    their sums back; a member may be both.

    Each half is split in two, so that a member can do other work between sending and receiving.
    """

    def __init__(
        self,
        transport: Transport,
        slots_per_rank: int,
        sources: Sequence[int] | None = None,
        servers: Sequence[int] | None = None,
        rows: Rows | None = None,
    ) -> None:
        """`slots_per_rank`: slots on each serving rank and layer, the same on all members.
        `sources`, `servers`: logical ranks; None: all. `rows`: what packs and sums; None: torch.
        """
        self._transport = transport
        self._slots = slots_per_rank
        self._rows = rows or TorchRows()
        everybody = range(transport.size)
        is_source = sources is None or transport.index in sources
        is_server = servers is None or transport.index in servers
        from_all = tuple(everybody if sources is None else sources)
        to_all = tuple(everybody if servers is None else servers)
        self._out = Flow(from_all if is_server else (), to_all if is_source else ())
        self._back = Flow(to_all if is_source else (), from_all if is_server else ())

    def dispatch(self, hidden_TH: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Send each token to the ranks that hold its experts; return the rows sent here.

        `hidden_TH`: float32, bfloat16 or float16, the same on all members; T may be 0.
        `slot_ids_TK`: integers, physical slots over the whole domain, logical rank * S + slot, or
        -1 for none (the choice is dropped). `weights_TK`: any float. Raises DomainLeft,
        CommunicationFailed.
        """
        return self.receive(self.send(hidden_TH, slot_ids_TK, weights_TK))

    def send(self, hidden_TH: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Sent:
        """The first half of `dispatch`, which waits for nobody's tokens."""
        if self._transport.size == 1:
            return Sent(hidden_TH, slot_ids_TK, weights_TK, None)
        slot_ids_TK, weights_TK = slot_ids_TK.to(torch.int64), weights_TK.to(torch.float32)
        route = self._rows.route(slot_ids_TK, self._transport.size, self._slots)
        layout = _layout(hidden_TH.shape[1], hidden_TH.itemsize, slot_ids_TK.shape[1])
        outbox = self._transport.outbox(layout.row_bytes, route.sent_N, flow=self._out)
        self._rows.pack(layout, hidden_TH, slot_ids_TK, weights_TK, route.tokens_M, outbox)
        self._transport.send()
        return Sent(hidden_TH, slot_ids_TK, weights_TK, route)

    def receive(self, sent: Sent) -> Dispatched:
        """The second half of `dispatch`."""
        hidden_TH, slot_ids_TK, route = sent.hidden_TH, sent.slot_ids_TK, sent.route
        if route is None:
            return self._dispatch_alone(hidden_TH, slot_ids_TK, sent.weights_TK)
        pieces = self._transport.receive()
        layout = _layout(hidden_TH.shape[1], hidden_TH.itemsize, slot_ids_TK.shape[1])
        first = self._transport.index * self._slots
        rows_RH, local_RK, weights_RK = self._rows.unpack(
            layout, pieces, hidden_TH, first, self._slots
        )
        handle = DispatchHandle(hidden_TH, route, tuple(piece.shape[0] for piece in pieces))
        return Dispatched(rows_RH, local_RK, weights_RK, handle)

    def combine(self, out_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """Return each row's partial weighted sum to its source; add them up per token.

        `out_RH`: in the order of `Dispatched.rows_RH`, in the dispatched dtype, float32 or float64,
        the same on all members. Returns `[T, H]` in the dispatched dtype: sums in float32, or in
        float64, in the order of logical ranks, so equal inputs give equal bits. Raises DomainLeft,
        CommunicationFailed.
        """
        if handle.route is None:
            return out_RH.to(handle.like.dtype)
        transport, route = self._transport, handle.route
        row_bytes = out_RH.shape[1] * out_RH.itemsize
        outbox = transport.outbox(row_bytes, handle.received_N, route.sent_N, self._back)
        outbox.view(out_RH.dtype).copy_(out_RH)
        transport.send()
        like = handle.like
        combined_TH = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._rows.sum_parts(transport.receive(), out_RH.dtype, route, combined_TH)
        return combined_TH

    def _dispatch_alone(
        self, hidden_TH: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched:
        self._transport.check_fence()
        handle = DispatchHandle(hidden_TH, None, (hidden_TH.shape[0],))
        return Dispatched(
            hidden_TH, *self._rows.alone(slot_ids_TK, weights_TK, self._slots), handle
        )
