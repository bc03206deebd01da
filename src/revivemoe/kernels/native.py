"""`kernels.cpp` for tensors. All on the CPU, float32 or bfloat16, weights of the rows' dtype.

Legend: M rows, N outputs, K inner size, R rows of experts, C choices of each, S slots, H hidden,
I inner size of an expert.
"""

from ctypes import Array, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from revivemoe.kernels.library import function_of, open_library

DTYPES = (torch.float32, torch.bfloat16)
SCRATCH = 1 << 24
"""Floats in which experts lay out rows, or so many as `LEAST_ROWS` take: what there are more of is
computed in portions."""
LEAST_ROWS = 64
MOST_CHOICES = 64


class Seen(NamedTuple):
    """Rows that attend, and what of the pages each of them sees. Contiguous, int64."""

    rows_B: Tensor
    blocks_BN: Tensor
    """Its block table, padded with anything."""
    lengths_B: Tensor
    """Positions from the first on; at least 1."""


class Head(NamedTuple):
    """Of queries or keys: how its products come to be what attention takes."""

    weight: Tensor
    """[heads * D, K]"""
    bias: Tensor | None
    norm: Tensor | None
    """[D], of an RMS norm of each head."""
    eps: float


class Native:
    """The functions of the library, and what they can be used for."""

    def __init__(self) -> None:
        """Raises NoKernels."""
        library = open_library()
        self.block = int(library.rv_block())
        """Inner sizes of experts must be multiples of it."""
        self._linear = function_of(library, "rv_linear", "pipppiiibb")
        self._rms_norm = function_of(library, "rv_rms_norm", "pippiifb")
        self._project = function_of(library, "rv_project", "ppppffiiiippppppiibb")
        self._route = function_of(library, "rv_route_rows", "pippiiiibbpppbb")
        self._experts = function_of(library, "rv_experts", "ppppppiiiiibbb")
        self._attention = function_of(library, "rv_attention", "ppppppppiiiiiiiiiifbb")

    def fits(self, weight: Tensor) -> bool:
        """Whether rows can be multiplied by this [N, K] weight."""
        on_cpu = weight.device.type == "cpu"
        return weight.dtype in DTYPES and on_cpu and weight.is_contiguous()

    def fits_experts(self, weights: Tensor) -> bool:
        """Whether rows can be multiplied by these [S, N, K] weights of experts."""
        return self.fits(weights) and weights.shape[-1] % self.block == 0

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., K] to [..., N]."""
        num_outputs, inner = weight.shape
        if rows.shape[-1] != inner or rows.dtype != weight.dtype:
            raise RuntimeError(f"{rows.shape} {rows.dtype} times {weight.shape} {weight.dtype}")
        if bias is not None and (bias.dtype != rows.dtype or not bias.is_contiguous()):
            bias = bias.to(rows.dtype).contiguous()
        rows_MK = rows.reshape(-1, inner)
        if rows_MK.stride(-1) != 1:
            rows_MK = rows_MK.contiguous()
        num_rows = rows_MK.shape[0]
        out = torch.empty((*rows.shape[:-1], num_outputs), dtype=rows.dtype)
        if num_rows:
            self._linear(
                rows_MK.data_ptr(), rows_MK.stride(0), weight.data_ptr(),
                None if bias is None else bias.data_ptr(), out.data_ptr(),
                num_rows, num_outputs, inner, rows.dtype == torch.bfloat16, torch.get_num_threads(),
            )  # fmt: skip
        return out

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., N] to [..., N]; `weight` [N], of the dtype of the rows."""
        rows = rows.contiguous()
        out, size = torch.empty_like(rows), len(weight)
        self._rms_norm(
            rows.data_ptr(), size, weight.data_ptr(), out.data_ptr(), rows.numel() // size, size,
            eps, rows.dtype == torch.bfloat16,
        )  # fmt: skip
        return out

    def project(
        self,
        rows_TK: Tensor,
        query: Head,
        key: Head,
        value: tuple[Tensor, Tensor | None],
        angles: tuple[Tensor, Tensor],
        slots_T: Tensor,
        pages: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Queries [T, Hq, D] of rows; their keys and values are written into `slots_T` (int64,
        block * P + offset) of the pages, [NB, P, Hk, D] and [NB, P, Hk, Dv]. `value`: weight, bias.
        `angles`: cosines and sines, [T, D], of the rows' dtype; the halves of a head are turned.
        """
        (num_rows, inner), (key_pages, value_pages) = rows_TK.shape, pages
        kv_heads, dim, dim_v = key_pages.shape[2], key_pages.shape[3], value_pages.shape[3]
        heads = query.weight.shape[0] // dim
        cos, sin = angles
        given = (rows_TK, query.weight, key.weight, value[0], cos, sin, key_pages, value_pages)
        if {tensor.dtype for tensor in given} != {rows_TK.dtype}:
            raise RuntimeError("rows, weights, angles and pages are of different dtypes")
        query_THD = torch.empty(num_rows, heads, dim, dtype=rows_TK.dtype)
        if num_rows:
            self._project(
                rows_TK.data_ptr(), _addresses(query.weight, key.weight, value[0]),
                _addresses(query.bias, key.bias, value[1]), _addresses(query.norm, key.norm),
                query.eps, key.eps, heads, kv_heads, dim, dim_v, cos.data_ptr(), sin.data_ptr(),
                slots_T.data_ptr(), query_THD.data_ptr(), key_pages.data_ptr(),
                value_pages.data_ptr(), num_rows, inner, rows_TK.dtype == torch.bfloat16,
                torch.get_num_threads(),
            )  # fmt: skip
        return query_THD

    def route(
        self,
        rows_TH: Tensor,
        weight_EH: Tensor,
        top_k: int,
        normalise: bool,
        dtype: torch.dtype,
        missing_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E]; the largest of their softmax [T, K], of `dtype` (the rows' or float32);
        whose they are, int64. `normalise`: they sum up to 1. `missing_E`, bool: weighs 0, is last.
        """
        (num_rows, inner), num_experts = rows_TH.shape, len(weight_EH)
        if rows_TH.dtype != weight_EH.dtype or not 0 < top_k <= min(num_experts, MOST_CHOICES):
            raise RuntimeError(f"{top_k} of {num_experts} {weight_EH.dtype} for {rows_TH.dtype}")
        logits = torch.empty(num_rows, num_experts, dtype=rows_TH.dtype)
        weights = torch.empty(num_rows, top_k, dtype=dtype)
        ids = torch.empty(num_rows, top_k, dtype=torch.int64)
        if num_rows:
            rows_TH = rows_TH.contiguous()
            self._route(
                rows_TH.data_ptr(), inner, weight_EH.data_ptr(),
                None if missing_E is None else missing_E.data_ptr(), num_rows, num_experts, inner,
                top_k, normalise, dtype == rows_TH.dtype, logits.data_ptr(), weights.data_ptr(),
                ids.data_ptr(), rows_TH.dtype == torch.bfloat16, torch.get_num_threads(),
            )  # fmt: skip
        return logits, weights, ids

    def experts(
        self,
        rows_RH: Tensor,
        slot_ids_RC: Tensor,
        weights_RC: Tensor,
        gate_up: Tensor,
        down: Tensor,
        exact: bool = False,
    ) -> Tensor:
        """For each row the weighted sum of down(silu(gate(x)) * up(x)) over its choices: [R, H].

        `slot_ids_RC` int64, S or more for none; `weights_RC` float32; `gate_up` [S, 2I, H]; `down`
        [S, H, I]. In float32; `exact`: in float64, of terms rounded so that their sum is the same
        in any order, up to sums of 2^17.
        """
        if {rows_RH.dtype, gate_up.dtype} != {down.dtype}:
            raise RuntimeError(f"rows {rows_RH.dtype} for experts {gate_up.dtype} {down.dtype}")
        dtype = torch.float64 if exact else torch.float32
        out_RH = torch.empty(rows_RH.shape, dtype=dtype)
        (num_rows, hidden), choices = rows_RH.shape, slot_ids_RC.shape[1]
        num_slots, _, inner = down.shape
        if num_rows == 0 or num_slots == 0:
            return out_RH.zero_()
        rows_RH = rows_RH.contiguous()
        slot_ids_RC, weights_RC = slot_ids_RC.contiguous(), weights_RC.contiguous()
        at_once = max(SCRATCH // (hidden + choices * (hidden + inner)), LEAST_ROWS)
        for first in range(0, num_rows, at_once):
            rows, slots, weights, out = (
                whole[first : first + at_once]
                for whole in (rows_RH, slot_ids_RC, weights_RC, out_RH)
            )
            self._experts(
                rows.data_ptr(), slots.data_ptr(), weights.data_ptr(), gate_up.data_ptr(),
                down.data_ptr(), out.data_ptr(), len(rows), choices, num_slots, hidden, inner,
                rows.dtype == torch.bfloat16, exact, torch.get_num_threads(),
            )  # fmt: skip
        return out_RH

    def attends(self, pages: Tensor) -> bool:
        """Whether there is attention over such pages."""
        return pages.dtype in DTYPES and pages.device.type == "cpu"

    def attend(
        self,
        query_THD: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        seen: Seen,
        out_THD: Tensor,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Attention of some of the rows of `query_THD`, [T, Hq, D], over pages [NB, P, Hk, D]; into
        the same rows of `out_THD`, [T, Hq, Dv], contiguous. `sinks`: [Hq] float32, logits of
        nothing.
        """
        if not len(seen.rows_B):
            return
        if {query_THD.dtype, value_pages.dtype, out_THD.dtype} != {key_pages.dtype}:
            raise RuntimeError("query, keys, values and output are of different dtypes")
        if query_THD.stride(-1) != 1:
            query_THD = query_THD.contiguous()
        _, heads, dim = query_THD.shape
        _, block_size, kv_heads, dim_v = value_pages.shape
        self._attention(
            query_THD.data_ptr(), key_pages.data_ptr(), value_pages.data_ptr(),
            seen.rows_B.data_ptr(), seen.blocks_BN.data_ptr(), seen.lengths_B.data_ptr(),
            None if sinks is None else sinks.data_ptr(), out_THD.data_ptr(), len(seen.rows_B),
            heads, kv_heads, dim, dim_v, block_size, query_THD.stride(0), query_THD.stride(1),
            seen.blocks_BN.shape[1], window or 0, scale, query_THD.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip


def _addresses(*tensors: Tensor | None) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
