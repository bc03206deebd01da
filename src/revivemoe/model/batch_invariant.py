"""A forward in which no row's bits depend on the rows beside it, or a refusal.

What the model's own code multiplies goes through here: linear layers to our kernels, whose rows do
not depend on their batch; any other product of matrices, whose library decides by shape how it adds
up, is refused. Norms, activations, softmax and top-k of torch work row by row.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from revivemoe.kernels.native import Native

PRODUCTS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot",
    "einsum", "tensordot", "chain_matmul", "scaled_dot_product_attention", "bilinear",
    "conv1d", "conv2d", "conv3d", "_grouped_mm", "grouped_mm",
})  # fmt: skip


ELEMENTWISE = frozenset({
    "silu", "sigmoid", "softplus", "logsigmoid", "rsqrt", "exp", "exp2", "expm1", "log", "log2",
    "log1p", "tanh", "gelu", "mish", "erf", "selu", "elu", "cos", "sin",
})  # fmt: skip
"""Of one argument. Torch computes the end of a tensor, or of a thread's share of it, otherwise than
what fills vectors: for silu, sigmoid, softplus (float32) and rsqrt (bfloat16) with other bits."""
VECTORS = 256
"""Elements: a multiple of all that the library takes at once."""
UNDIVIDED = 32768
"""Elements that it does not share out among threads."""


class BatchVariant(ValueError):
    """The model cannot be computed so; the message says what of it."""


class RowsAlone(TorchFunctionMode):
    """While it is entered. Raises BatchVariant from what cannot be computed so."""

    def __init__(self, native: Native) -> None:
        super().__init__()
        self._native = native

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is linear:
            return self._linear(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in PRODUCTS and _inner(args) > 1:
            raise BatchVariant(f"its code calls {name}")
        if name in ELEMENTWISE and args and isinstance(args[0], Tensor):
            return _in_whole_vectors(func, args[0], args[1:], kwargs or {})
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = weight.contiguous()
        if not self._native.fits(weight) or input.dtype != weight.dtype:
            shape, dtype = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
            raise BatchVariant(f"it has a linear layer of shape {shape} in {dtype}")
        return self._native.linear(input, weight, bias)


def _in_whole_vectors(
    func: Callable[..., object],
    values: Tensor,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> object:
    count = values.numel()
    padded = values.new_ones(-(-count // VECTORS) * VECTORS)
    padded[:count] = values.reshape(-1)
    results: list[Tensor] = []
    for piece in padded.split(UNDIVIDED):
        result = func(piece, *args, **kwargs)
        assert isinstance(result, Tensor)
        results.append(result)
    whole = torch.cat(results)[:count].view(values.shape) if results else padded.view(values.shape)
    return values.copy_(whole) if kwargs.get("inplace") else whole


def _inner(args: Sequence[object]) -> int:
    """Over how many products it sums; a single one needs no order. Of the usual two factors: with
    more, such as a sum to add to, it is not looked at.
    """
    first = args[0] if len(args) == 2 else None
    return first.shape[-1] if isinstance(first, Tensor) and first.dim() else 2
