"""`rows.h` for tensors: rows to the members of a domain and back, as `comm.dispatch` lays them out.

Legend: T tokens, K choices, N members, M rows sent, R rows received, H hidden size.
"""

from collections.abc import Sequence
from ctypes import Array, c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from revivemoe.kernels.library import function_of, open_library


@dataclass(frozen=True)
class RowLayout:
    """Of a row on the wire: K slot ids int64, K weights float32, and from `hidden_at` on H."""

    row_bytes: int
    hidden_at: int
    hidden: int
    top_k: int


class Route(NamedTuple):
    """Which token goes to which member."""

    sent_N: tuple[int, ...]
    tokens_M: Tensor
    """Token of each row, rows by destination and then by token."""
    rows_by_token_M: Tensor
    first_row_T: Tensor


class NativeRows:
    """On the CPU; sums of float32 or bfloat16."""

    def __init__(self) -> None:
        """Raises NoKernels."""
        library = open_library()
        self._route = function_of(library, "rv_route", "piiiipppp", c_int64)
        self._pack = function_of(library, "rv_pack_rows", "iiiipipppip")
        self._unpack = function_of(library, "rv_unpack_rows", "iiiippiiippp")
        self._alone = function_of(library, "rv_alone", "ppbiipp")
        self._sum = function_of(library, "rv_sum_parts", "ppiippiipbb")

    def route(self, slot_ids_TK: Tensor, members: int, slots: int) -> Route:
        num_tokens, top_k = slot_ids_TK.shape
        most = num_tokens * min(top_k, members)
        buffer = torch.empty(members + 2 * most + num_tokens, dtype=torch.int64)
        sent, tokens, by_token, first = buffer.split([members, most, most, num_tokens])
        slot_ids_TK = slot_ids_TK.contiguous()
        at = buffer.data_ptr()
        rows = self._route(
            slot_ids_TK.data_ptr(), num_tokens, top_k, members, slots,
            at, at + 8 * members, at + 8 * (members + most), at + 8 * (members + 2 * most),
        )  # fmt: skip
        return Route(tuple(sent.tolist()), tokens[:rows], by_token[:rows], first)

    def pack(
        self,
        layout: RowLayout,
        hidden_TH: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
        tokens_M: Tensor,
        out_MB: Tensor,
    ) -> None:
        """Rows on the wire, uint8 [M, B]. `slot_ids_TK` int64, `weights_TK` float32."""
        hidden_TH, slot_ids_TK = hidden_TH.contiguous(), slot_ids_TK.contiguous()
        weights_TK, size = weights_TK.contiguous(), hidden_TH.itemsize
        self._pack(
            layout.row_bytes, layout.hidden_at, layout.hidden * size, layout.top_k,
            hidden_TH.data_ptr(), layout.hidden * size, slot_ids_TK.data_ptr(),
            weights_TK.data_ptr(), tokens_M.data_ptr(), len(tokens_M), out_MB.data_ptr(),
        )  # fmt: skip

    def unpack(
        self, layout: RowLayout, pieces: Sequence[Tensor], like: Tensor, first: int, slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [R, H] of the dtype of `like`, slot ids and weights [R, K]: of choices that
        are not among the slots from id `first` on, `slots` and 0.
        """
        counts, dtype = [len(piece) for piece in pieces], like.dtype
        rows, members, top_k = sum(counts), len(pieces), layout.top_k
        hidden_RH = torch.empty(rows, layout.hidden, dtype=dtype)
        slot_ids_RK = torch.empty(rows, top_k, dtype=torch.int64)
        weights_RK = torch.empty(rows, top_k)
        self._unpack(
            layout.row_bytes, layout.hidden_at, layout.hidden * dtype.itemsize, top_k,
            _pointers(pieces), (c_int64 * members)(*counts), members, first, slots,
            hidden_RH.data_ptr(), slot_ids_RK.data_ptr(), weights_RK.data_ptr(),
        )  # fmt: skip
        return hidden_RH, slot_ids_RK, weights_RK

    def alone(self, slot_ids_TK: Tensor, weights_TK: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """As from `unpack`, where nobody else is there: ids int64, weights float32.
        `slot_ids_TK`: int64; `weights_TK`: any float.
        """
        slot_ids_TK, half = slot_ids_TK.contiguous(), weights_TK.dtype == torch.bfloat16
        weights_TK = weights_TK.contiguous() if half else weights_TK.float().contiguous()
        slot_ids_RK = torch.empty_like(slot_ids_TK)
        weights_RK = torch.empty(weights_TK.shape)
        self._alone(
            slot_ids_TK.data_ptr(), weights_TK.data_ptr(), half, slot_ids_TK.numel(), slots,
            slot_ids_RK.data_ptr(), weights_RK.data_ptr(),
        )  # fmt: skip
        return slot_ids_RK, weights_RK

    def sum_parts(
        self, pieces: Sequence[Tensor], parts: torch.dtype, route: Route, out_TH: Tensor
    ) -> None:
        """Each token's parts, added up in the order of its rows, in float64 if they are of it, else
        in float32; into `out_TH` of float32 or bfloat16.
        """
        members = len(pieces)
        if parts.itemsize < 4:
            pieces, parts = [piece.view(parts).float() for piece in pieces], torch.float32
        self._sum(
            _pointers(pieces), (c_int64 * members)(*route.sent_N), members, out_TH.shape[1],
            route.rows_by_token_M.data_ptr(), route.first_row_T.data_ptr(), len(out_TH),
            len(route.rows_by_token_M), out_TH.data_ptr(), parts == torch.float64,
            out_TH.dtype == torch.bfloat16,
        )  # fmt: skip


def _pointers(tensors: Sequence[Tensor]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
