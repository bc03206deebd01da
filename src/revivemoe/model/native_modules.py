"""Puts our own arithmetic into a loaded model's norms and linear layers, where it is the same, and
where it is faster.
"""

import inspect
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from revivemoe.kernels.native import DTYPES, Native

ROW_COUNTS = (1, 4, 16, 64)
"""Of which linear layers are timed; what is more is taken as the last."""
TIMED = 5
NO_LIMIT = 1 << 40
FASTER = 0.9
"""Ours must be so much faster: bits should not hang on noise."""


def use_native(
    model: nn.Module, native: Native, always: bool = False
) -> dict[tuple[int, ...], int]:
    """Change `forward` of the modules concerned. Their parameters stay, and may be exchanged.
    `always`: not only where it is faster. Returns up to how many rows it is, by shape of a weight.
    """
    most: dict[tuple[int, ...], int] = {}
    for module in model.modules():
        if type(module) is nn.Linear and native.fits(module.weight):
            shape = tuple(module.weight.shape)
            if shape not in most:
                most[shape] = NO_LIMIT if always else rows_ours(module.weight, native)
            if most[shape]:
                module.forward = partial(_linear, module, native, most[shape])
        elif (eps := norm_eps(module)) is not None and _is_rms_norm(module, native, eps):
            module.forward = partial(_rms_norm, module, native, eps, module.forward)
    return most


# ---- linear layers --------------------------------------------------------------------------


def _linear(module: nn.Linear, native: Native, most: int, rows: Tensor) -> Tensor:
    few, same = rows.numel() <= most * module.in_features, rows.dtype == module.weight.dtype
    if few and same and rows.shape[-1] == module.in_features:
        return native.linear(rows, module.weight, module.bias)
    return linear(rows, module.weight, module.bias)


def rows_ours(weight: Tensor, native: Native) -> int:
    """Up to how many rows at once our product is the faster one; 0: never."""
    most = 0
    for count in ROW_COUNTS:
        rows = torch.ones(count, weight.shape[1], dtype=weight.dtype)
        ours = _seconds(partial(native.linear, rows, weight, None))
        if ours > FASTER * _seconds(partial(linear, rows, weight)):
            return most
        most = count
    return NO_LIMIT


def _seconds(act: Callable[[], object]) -> float:
    """The shortest of some, the first left out."""
    act()
    taken = []
    for _ in range(TIMED):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


# ---- norms ----------------------------------------------------------------------------------


def norm_eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _rms_norm(
    module: nn.Module,
    native: Native,
    eps: float,
    original: Callable[[Tensor], Tensor],
    rows: Tensor,
) -> Tensor:
    weight = module.weight
    if rows.dtype != weight.dtype or rows.shape[-1] != len(weight):
        return original(rows)
    return native.rms_norm(rows, weight, eps)


def _is_rms_norm(module: nn.Module, native: Native, eps: float) -> bool:
    """Whether the module does what our norm does: tried on rows large and small."""
    weight = getattr(module, "weight", None)
    names = [name for name, _ in module.named_parameters()]
    if not isinstance(weight, Tensor) or names != ["weight"] or weight.dim() != 1:
        return False
    if weight.dtype not in DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False  # such as a norm with a gate
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, len(weight), generator=generator) * torch.tensor(
        [[3.0], [1], [0.1], [1e-3]]
    )
    rows = rows.to(weight.dtype)
    try:
        expected = module(rows)
    except Exception:  # others' code, that takes something else
        return False
    if (
        not isinstance(expected, Tensor)
        or expected.shape != rows.shape
        or expected.dtype != rows.dtype
    ):
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(
        native.rms_norm(rows, weight, eps).float(), expected.float(), tolerance, 1e-30
    )
