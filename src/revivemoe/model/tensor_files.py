"""A checkpoint's tensors, read when they are indexed; float8 ones as what they stand for."""

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from revivemoe.checkpoint.files import TensorInfo
from revivemoe.checkpoint.quantization import Block, scale_grid


class Lazy(Protocol):
    """A tensor that is read when indexed, as the converter does it."""

    def __getitem__(self, index: object, /) -> torch.Tensor: ...


class TensorSlice(Lazy, Protocol):
    """A slice of safetensors, or what stands for one."""

    def get_shape(self) -> list[int]: ...


class TensorFiles:
    """Opens each file once, at its first tensor; `stack` closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._opened: dict[Path, safe_open] = {}

    def slice(self, name: str, tensor: TensorInfo) -> TensorSlice:
        """Raises SafetensorError and OSError, as reading from it does."""
        stored: TensorSlice = self._open(tensor.file).get_slice(name)
        if tensor.scale is None:
            return stored
        scale = self._open(tensor.scale.file).get_slice(tensor.scale.name)
        return _Dequantized(stored, scale, tensor.scale.block)

    def _open(self, path: Path) -> safe_open:
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._opened[path]


class _Dequantized:
    """Weights times their scales, float32."""

    def __init__(self, weights: TensorSlice, scales: TensorSlice, block: Block) -> None:
        self._weights, self._scales, self._block = weights, scales, block

    def get_shape(self) -> list[int]:
        return self._weights.get_shape()

    def __getitem__(self, index: object) -> torch.Tensor:
        if isinstance(index, int):  # one expert of many: the others are not read
            scales = self._scales[...].float()
            grid = scale_grid(tuple(self.get_shape()), tuple(scales.shape))
            one = scales.view(grid)[index] if scales.numel() > 1 else scales
            return dequantize(self._weights[index], one, self._block)
        whole = dequantize(self._weights[...], self._scales[...], self._block)
        return whole[index]


def dequantize(weights: torch.Tensor, scales: torch.Tensor, block: Block) -> torch.Tensor:
    """Float8 weights [..., rows, columns] times the scale of each one's block, float32."""
    numbers = weights.float()
    if scales.numel() == 1:
        return numbers.mul_(scales.float().reshape(()))
    (rows, columns), (high, wide) = weights.shape[-2:], block
    grid = scales.float().view(scale_grid(tuple(weights.shape), tuple(scales.shape)))
    for dim, size, length in ((-2, high, rows), (-1, wide, columns)):
        if grid.shape[dim] > 1:
            grid = grid.repeat_interleave(size, dim).narrow(dim, 0, length)
    return numbers.mul_(grid)
