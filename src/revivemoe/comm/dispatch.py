"""Dispatch and combine: rows to the ranks that hold their experts, and the partial sums back.

Legend for shapes: T tokens of this rank, K experts per token, H hidden size, N members, S slots
per rank, M rows sent, R rows received. A row is one token on its way to one rank: a token goes to
each rank at most once, however many of its experts are there.

    to the experts   | K slot ids int64, of the domain | K weights float32 | pad | H hidden | pad |
    back             | H partial sum |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revivemoe.comm.shm import region_bytes_for, round_up
from revivemoe.comm.transport import Flow, Transport

_ALIGN = 16


@dataclass(frozen=True)
class DispatchHandle:
    """What combine needs of the dispatch it answers. Opaque to callers."""

    num_tokens: int
    dtype: torch.dtype
    device: torch.device
    rows_by_token_M: Tensor
    """Rows sent, int64, by token and then by destination. (They are sent the other way round.)"""
    first_row_T: Tensor
    """Where each token's rows begin in `rows_by_token_M`."""
    sent_N: tuple[int, ...]
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
    route: "_Route | None"
    """None in a domain of one."""


@dataclass(frozen=True)
class _Route:
    """Which token goes to which rank, on the host."""

    sent_N: tuple[int, ...]
    tokens_M: np.ndarray
    """Token of each row, rows by destination and then by token."""
    rows_by_token_M: np.ndarray
    first_row_T: np.ndarray


def _hidden_offset(top_k: int) -> int:
    return round_up(top_k * (8 + 4), _ALIGN)


def _row_bytes(hidden: int, itemsize: int, top_k: int) -> int:
    return _hidden_offset(top_k) + round_up(hidden * itemsize, _ALIGN)


def region_bytes(num_ranks: int, max_tokens: int, hidden: int, itemsize: int, top_k: int) -> int:
    """Size of a rank's shared-memory region, bytes, such that no exchange can exceed it.

    `max_tokens` is the most tokens that any rank runs in one step. A rank sends each of its tokens
    to at most min(N, K) ranks, and returns at most one sum, float32, for each token of each rank.
    """
    out = max_tokens * min(num_ranks, top_k) * _row_bytes(hidden, itemsize, top_k)
    back = max_tokens * num_ranks * hidden * max(itemsize, 4)
    return region_bytes_for(num_ranks, max(out, back))


def _route(slot_ids_TK: np.ndarray, size: int, slots: int) -> _Route:
    """Rows for each of `size` members."""
    num_tokens = len(slot_ids_TK)
    sent_TN = np.zeros((num_tokens, size + 1), np.bool_)  # the last column is for "none", -1
    sent_TN[np.arange(num_tokens)[:, None], slot_ids_TK // slots] = True
    ranks_M, tokens_M = sent_TN[:, :size].T.nonzero()
    first_row_T = np.zeros(num_tokens, np.int64)
    np.cumsum(np.bincount(tokens_M, minlength=num_tokens)[:-1], out=first_row_T[1:])
    return _Route(
        sent_N=tuple(np.bincount(ranks_M, minlength=size).tolist()),
        tokens_M=tokens_M,
        rows_by_token_M=tokens_M.argsort(kind="stable"),
        first_row_T=first_row_T,
    )


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
    ) -> None:
        """`slots_per_rank`: slots on each serving rank and layer, the same on all members.
        `sources`, `servers`: logical ranks; None: all.
        """
        self._transport = transport
        self._slots = slots_per_rank
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
        route = _route(slot_ids_TK.cpu().numpy(), self._transport.size, self._slots)
        rows_TB = _pack(hidden_TH, slot_ids_TK, weights_TK)
        outbox = self._transport.outbox(rows_TB.shape[1], route.sent_N, flow=self._out)
        _gather(rows_TB, torch.from_numpy(route.tokens_M).to(hidden_TH.device), outbox)
        self._transport.send()
        return Sent(hidden_TH, slot_ids_TK, weights_TK, route)

    def receive(self, sent: Sent) -> Dispatched:
        """The second half of `dispatch`."""
        hidden_TH, slot_ids_TK, route = sent.hidden_TH, sent.slot_ids_TK, sent.route
        if route is None:
            return self._dispatch_alone(hidden_TH, slot_ids_TK, sent.weights_TK)
        device, hidden = hidden_TH.device, hidden_TH.shape[1]
        pieces = self._transport.receive()
        inbox = torch.cat(pieces).to(device)
        rows, ids, weights = _fields(inbox, hidden_TH.dtype, hidden, slot_ids_TK.shape[1])
        local_ids = ids - self._transport.index * self._slots
        here = (local_ids >= 0) & (local_ids < self._slots)
        handle = DispatchHandle(
            num_tokens=hidden_TH.shape[0],
            dtype=hidden_TH.dtype,
            device=device,
            rows_by_token_M=torch.from_numpy(route.rows_by_token_M).to(device),
            first_row_T=torch.from_numpy(route.first_row_T).to(device),
            sent_N=route.sent_N,
            received_N=tuple(piece.shape[0] for piece in pieces),
        )
        return Dispatched(
            rows_RH=rows.contiguous(),
            slot_ids_RK=torch.where(here, local_ids, self._slots),
            weights_RK=torch.where(here, weights, 0.0),
            handle=handle,
        )

    def combine(self, out_RH: Tensor, handle: DispatchHandle) -> Tensor:
        """Return each row's partial weighted sum to its source; add them up per token.

        `out_RH`: in the order of `Dispatched.rows_RH`, in the dispatched dtype or float32, the same
        on all members. Returns `[T, H]` in the dispatched dtype: sums in float32, in the order of
        logical ranks, so equal inputs give equal bits. Raises DomainLeft, CommunicationFailed.
        """
        if self._transport.size == 1:
            return out_RH.to(handle.dtype)
        row_bytes = out_RH.shape[1] * out_RH.itemsize
        transport = self._transport
        outbox = transport.outbox(row_bytes, handle.received_N, handle.sent_N, self._back)
        outbox.view(out_RH.dtype).copy_(out_RH)
        transport.send()
        pieces = transport.receive()
        parts_MH = torch.cat(pieces).view(out_RH.dtype).to(handle.device, torch.float32)
        return _sum_per_token(parts_MH, handle).to(handle.dtype)

    def _dispatch_alone(
        self, hidden_TH: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched:
        self._transport.check_fence()
        none = slot_ids_TK < 0
        num_tokens = hidden_TH.shape[0]
        handle = DispatchHandle(
            num_tokens=num_tokens,
            dtype=hidden_TH.dtype,
            device=hidden_TH.device,
            rows_by_token_M=torch.empty(0, dtype=torch.int64),
            first_row_T=torch.empty(0, dtype=torch.int64),
            sent_N=(num_tokens,),
            received_N=(num_tokens,),
        )
        return Dispatched(
            rows_RH=hidden_TH,
            slot_ids_RK=slot_ids_TK.to(torch.int64).masked_fill(none, self._slots),
            weights_RK=weights_TK.to(torch.float32).masked_fill(none, 0.0),
            handle=handle,
        )


def _pack(hidden_TH: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """One row on the wire for each token, uint8 `[T, B]`."""
    (num_tokens, hidden), top_k = hidden_TH.shape, slot_ids_TK.shape[1]
    row_bytes = _row_bytes(hidden, hidden_TH.itemsize, top_k)
    rows_TB = torch.empty(num_tokens, row_bytes, dtype=torch.uint8, device=hidden_TH.device)
    rows, ids, weights = _fields(rows_TB, hidden_TH.dtype, hidden, top_k)
    rows.copy_(hidden_TH)
    ids.copy_(slot_ids_TK)
    weights.copy_(weights_TK)
    return rows_TB


def _gather(rows_TB: Tensor, tokens_M: Tensor, outbox_MB: Tensor) -> None:
    """Copy the tokens' rows into the outbox: directly, if it lies on the same device."""
    if rows_TB.device == outbox_MB.device:
        torch.index_select(rows_TB, 0, tokens_M, out=outbox_MB)
    else:
        outbox_MB.copy_(rows_TB.index_select(0, tokens_M))


def _sum_per_token(parts_MH: Tensor, handle: DispatchHandle) -> Tensor:
    """Add up each token's parts, one after another in the order of its rows: float32 `[T, H]`.

    An embedding bag does just that in one kernel, without atomics on a GPU.
    """
    if handle.num_tokens == 0 or len(parts_MH) == 0:
        return parts_MH.new_zeros(handle.num_tokens, parts_MH.shape[1])
    return torch.embedding_bag(parts_MH, handle.rows_by_token_M, handle.first_row_T)[0]


def _fields(
    rows_MB: Tensor, dtype: torch.dtype, hidden: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of hidden states `[M, H]`, slot ids and weights `[M, K]` in rows on the wire."""
    return (
        rows_MB.view(dtype).narrow(1, _hidden_offset(top_k) // dtype.itemsize, hidden),
        rows_MB.view(torch.int64).narrow(1, 0, top_k),
        rows_MB.view(torch.float32).narrow(1, 2 * top_k, top_k),
    )
