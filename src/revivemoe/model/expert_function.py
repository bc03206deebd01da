"""What computes the experts of one module: `transformers`' grouped matmul, or ours where it can."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from revivemoe.kernels.native import Native
from revivemoe.model.batch_invariant import BatchVariant

EXPERTS_BACKEND = "grouped_mm"
"""The fastest of `transformers`' own implementations on CPU and CUDA (docs/decisions.md)."""

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, H], slot ids [R, C] with S for none, weights [R, C]) to sums, [R, H], float32, or
float64 where they are exact.
"""


def experts_of(
    module: nn.Module, dtype: torch.dtype, native: Native | None, exact: bool = False
) -> Experts:
    """`module` holds S slots; parameters may be exchanged for others later, of other slots. Rows
    will be of `dtype`. `exact`: sums are float64, and the same however experts are spread over
    ranks. Raises BatchVariant where that cannot be.
    """
    if native is not None and _is_plain(module, dtype, native):
        return NativeExperts(module, native, exact)
    if exact:
        name = type(module).__name__
        raise BatchVariant(f"the experts of {name} are not gate, up, silu, down in {dtype}")
    return OwnExperts(module)


def _is_plain(module: nn.Module, dtype: torch.dtype, native: Native) -> bool:
    """Whether an expert is down(silu(gate(x)) * up(x)), and its weights are of a kind that fits.
    Experts may be kept in float32.
    """
    names = {name for name, _ in module.named_parameters()}
    return (
        names == {"gate_up_proj", "down_proj"}
        and module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        and native.fits_experts(module.gate_up_proj)
        and native.fits_experts(module.down_proj)
        and module.gate_up_proj.dtype == module.down_proj.dtype == dtype
    )


class NativeExperts:
    def __init__(self, module: nn.Module, native: Native, exact: bool) -> None:
        self._module, self._native, self._exact = module, native, exact

    def __call__(self, rows_RH: Tensor, slot_ids_RC: Tensor, weights_RC: Tensor) -> Tensor:
        up, down = self._module.gate_up_proj, self._module.down_proj
        return self._native.experts(rows_RH, slot_ids_RC, weights_RC, up, down, self._exact)


class OwnExperts:
    """As the module's family in `transformers` has it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._backend = ALL_EXPERTS_FUNCTIONS[EXPERTS_BACKEND]

    def __call__(self, rows_RH: Tensor, slot_ids_RC: Tensor, weights_RC: Tensor) -> Tensor:
        """Only real (row, slot) pairs are computed."""
        out_RH = torch.zeros(rows_RH.shape, dtype=torch.float32, device=rows_RH.device)
        row_of, choice_of = (slot_ids_RC < self._module.num_experts).nonzero(as_tuple=True)
        if len(row_of):
            ids = slot_ids_RC[row_of, choice_of][:, None]
            weights = weights_RC[row_of, choice_of][:, None]
            picked = self._backend(self._module, rows_RH[row_of], ids, weights)
            out_RH = _sum_by_row(picked.float(), row_of, len(rows_RH))
        return out_RH


def _sum_by_row(picked_PH: Tensor, row_of_P: Tensor, num_rows: int) -> Tensor:
    """Of each row its choices, one after another: `row_of_P` ascends. Without atomics, whose order
    of sums differs from run to run on a GPU.
    """
    rows = torch.arange(num_rows, device=row_of_P.device)
    first_R = torch.searchsorted(row_of_P, rows)
    order_P = torch.arange(len(picked_PH), device=row_of_P.device)
    return torch.embedding_bag(picked_PH, order_P, first_R)[0]
