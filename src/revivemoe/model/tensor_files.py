"""A checkpoint's tensors, read when they are indexed; float8 ones as what they stand for."""

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from revivemoe.checkpoint.files import MAX_HEADER_BYTES, TensorInfo
from revivemoe.checkpoint.quantization import Block, scale_grid

STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""How safetensors spells dtypes that models have."""
HEADERS = 256
"""Whose positions are remembered."""


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
        self._plain: dict[Path, _PlainFile] = {}

    def slice(self, name: str, tensor: TensorInfo) -> TensorSlice:
        """Raises SafetensorError and OSError, as reading from it does."""
        stored: TensorSlice = self._open(tensor.file).get_slice(name)
        if tensor.scale is None:
            return stored
        scale = self._open(tensor.scale.file).get_slice(tensor.scale.name)
        return _Dequantized(stored, scale, tensor.scale.block)

    def read_into(
        self, out: torch.Tensor, name: str, tensor: TensorInfo, row: int | None = None
    ) -> bool:
        """Read a tensor, or one row of its first dimension, to where it is to lie: nothing is
        copied in between. False, and nothing is read, where it has to be changed on its way.

        Raises OSError, SafetensorError.
        """
        shape = tensor.shape if row is None else tensor.shape[1:]
        stored_so = tensor.scale is None and STORED.get(out.dtype) == tensor.dtype
        here = out.device.type == "cpu" and out.is_contiguous()
        if not (stored_so and here and tuple(out.shape) == shape):
            return False
        if tensor.file not in self._plain:
            self._plain[tensor.file] = _PlainFile(tensor.file, self._stack)
        rows = 1 if row is None else tensor.shape[0]
        self._plain[tensor.file].read_into(out, name, row or 0, rows)
        return True

    def _open(self, path: Path) -> safe_open:
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._opened[path]


class _PlainFile:
    """A file of safetensors, read at positions."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._fd = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._fd)
        (length,) = struct.unpack("<Q", self._read(8, 0))
        if length > MAX_HEADER_BYTES:
            raise SafetensorError(f"{path}: its header is too long")
        self._positions = _positions(self._read(length, 8))
        self._begin = 8 + length

    def read_into(self, out: torch.Tensor, name: str, row: int, rows: int) -> None:
        """A row of so many."""
        begin, end = self._positions.get(name, (0, 0))
        if begin < 0 or end - begin != rows * out.nbytes or not 0 <= row < rows:
            raise SafetensorError(f"{self._path}: {name} is not what it was at the start")
        target = memoryview(out.detach().view(-1).view(torch.uint8).numpy())
        at = self._begin + begin + row * out.nbytes
        while target.nbytes:
            count = os.preadv(self._fd, [target], at)
            if count == 0:
                raise SafetensorError(f"{self._path} is cut short")
            target, at = target[count:], at + count

    def _read(self, count: int, at: int) -> bytes:
        found = os.pread(self._fd, count, at)
        if len(found) != count:
            raise SafetensorError(f"{self._path} is cut short")
        return found


@lru_cache(HEADERS)
def _positions(header: bytes) -> Mapping[str, tuple[int, int]]:
    """First byte and end of each tensor, behind the header. Raises SafetensorError."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {name: (e["data_offsets"][0], e["data_offsets"][1]) for name, e in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SafetensorError(f"a header is damaged: {error}") from None


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
