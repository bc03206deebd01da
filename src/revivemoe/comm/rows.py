"""Rows to the members of a domain and back, in torch's operators: on any device, of any dtype.

Legend: T tokens, K choices, N members, M rows sent, R rows received, H hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from revivemoe.kernels.rows import NativeRows, Route, RowLayout


class TorchRows:
    """For tensors of any device; the transport's may lie on another."""

    def route(self, slot_ids_TK: Tensor, members: int, slots: int) -> Route:
        """Rows for each member; slot id -1 stands for none."""
        ids_TK, device = slot_ids_TK.cpu().numpy(), slot_ids_TK.device
        num_tokens = len(ids_TK)
        sent_TN = np.zeros((num_tokens, members + 1), np.bool_)  # the last column is for "none"
        sent_TN[np.arange(num_tokens)[:, None], ids_TK // slots] = True
        ranks_M, tokens_M = sent_TN[:, :members].T.nonzero()
        first_row_T = np.zeros(num_tokens, np.int64)
        np.cumsum(np.bincount(tokens_M, minlength=num_tokens)[:-1], out=first_row_T[1:])
        by_token_M = tokens_M.argsort(kind="stable")
        return Route(
            tuple(np.bincount(ranks_M, minlength=members).tolist()),
            *(torch.from_numpy(a).to(device) for a in (tokens_M, by_token_M, first_row_T)),
        )

    def pack(
        self,
        layout: RowLayout,
        hidden_TH: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
        tokens_M: Tensor,
        out_MB: Tensor,
    ) -> None:
        """One row on the wire for each token, and the tokens' rows into `out_MB`, uint8."""
        size, device = (len(hidden_TH), layout.row_bytes), hidden_TH.device
        rows_TB = torch.empty(size, dtype=torch.uint8, device=device)
        rows, ids, weights = _fields(layout, rows_TB, hidden_TH.dtype)
        rows.copy_(hidden_TH)
        ids.copy_(slot_ids_TK)
        weights.copy_(weights_TK)
        if device == out_MB.device:
            torch.index_select(rows_TB, 0, tokens_M, out=out_MB)
        else:
            out_MB.copy_(rows_TB.index_select(0, tokens_M))

    def unpack(
        self, layout: RowLayout, pieces: Sequence[Tensor], like: Tensor, first: int, slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [R, H], slot ids and weights [R, K], on the device and of the dtype of
        `like`. Of choices not among the slots from id `first` on: `slots`, and 0.
        """
        inbox = torch.cat(list(pieces)).to(like.device)
        rows, ids, weights = _fields(layout, inbox, like.dtype)
        local_ids = ids - first
        here = (local_ids >= 0) & (local_ids < slots)
        return (
            rows.contiguous(),
            torch.where(here, local_ids, slots),
            torch.where(here, weights, 0.0),
        )

    def alone(self, slot_ids_TK: Tensor, weights_TK: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """As from `unpack`, where nobody else is there: ids int64, weights float32."""
        none = slot_ids_TK < 0
        return (
            slot_ids_TK.to(torch.int64).masked_fill(none, slots),
            weights_TK.to(torch.float32).masked_fill(none, 0.0),
        )

    def sum_parts(
        self, pieces: Sequence[Tensor], parts: torch.dtype, route: Route, out_TH: Tensor
    ) -> None:
        """Each token's parts, of dtype `parts`, one after another in the order of its rows.

        An embedding bag does just that in one kernel, without atomics on a GPU.
        """
        wide = torch.promote_types(parts, torch.float32)
        parts_MH = torch.cat(list(pieces)).view(parts).to(out_TH.device, wide)
        if len(out_TH) == 0 or len(parts_MH) == 0:
            out_TH.zero_()
            return
        out_TH.copy_(torch.embedding_bag(parts_MH, route.rows_by_token_M, route.first_row_T)[0])


Rows = TorchRows | NativeRows
"""What a dispatcher does with rows; ours does the same with fewer calls."""


def _fields(
    layout: RowLayout, rows_MB: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of hidden states `[M, H]`, slot ids and weights `[M, K]` in rows on the wire."""
    at, top_k = layout.hidden_at // dtype.itemsize, layout.top_k
    return (
        rows_MB.view(dtype).narrow(1, at, layout.hidden),
        rows_MB.view(torch.int64).narrow(1, 0, top_k),
        rows_MB.view(torch.float32).narrow(1, 2 * top_k, top_k),
    )
