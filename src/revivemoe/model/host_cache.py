"""Converted rows of experts in host memory, shared by all ranks of a host: no disk on a reload.

    header page | magic, layers, experts per layer, bytes per row | decoder layer numbers |
    valid       | one byte per (layer, expert), by layer                                  |
    rows        | row of (first layer, expert 0), (first layer, expert 1), ...            |
    a row       | the experts module's parameters for one expert, one after another       |

An anonymous memfd, sized at once; a page costs memory only once it is written. No locks: what a row
holds follows from the checkpoint alone, so whoever writes one, and however often, writes the same
bytes; the valid byte is stored last of all. A process that dies in the middle leaves it unset.

Store order: a reader that sees the valid byte must see the row. x86 keeps the order of stores and
of loads; other machines are refused, as in `revivemoe.comm.shm`.
"""

import mmap
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from revivemoe.checkpoint.files import EXPERT_KEY
from revivemoe.comm.shm import create_memfd, round_up
from revivemoe.ids import ExpertId, LayerId
from revivemoe.model.load import checkpoint_tensors

_MAGIC = 0x7265_7669_7665_0002
_PAGE = 4096
_ALIGN = 64
_FIXED = struct.Struct("=4q")

RowShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of one expert's share of each parameter of its module, by name."""


def expert_bytes(model_dir: Path, dtype: torch.dtype) -> int:
    """Bytes of one expert's rows, from the checkpoint's headers: conversion only rearranges.

    Raises CheckpointError.
    """
    values: dict[str, int] = {}
    for key, tensor in checkpoint_tensors(model_dir).items():
        if match := EXPERT_KEY.match(key):
            number, _, _ = match["rest"].partition(".")
            if not number.isdigit() or number == "0":
                size = prod(tensor.shape if number == "0" else tensor.shape[1:])
                values[match["layer"]] = values.get(match["layer"], 0) + size
    return max(values.values(), default=0) * dtype.itemsize


def create_host_cache(layers: Sequence[LayerId], num_experts: int, bytes_per_expert: int) -> int:
    """A new, empty cache for the experts of these MoE layers; returns its file descriptor.

    Hand it to each rank of this host; it is gone with the last process that holds it. Raises
    OSError.
    """
    row_bytes = round_up(bytes_per_expert, _ALIGN)
    header = _FIXED.pack(_MAGIC, len(layers), num_experts, row_bytes)
    header += struct.pack(f"={len(layers)}q", *layers)
    count = len(layers) * num_experts
    num_bytes = _rows_offset(len(layers), num_experts) + count * row_bytes
    return create_memfd("revivemoe-experts", num_bytes, header)


def _valid_offset(num_layers: int) -> int:
    return round_up(_FIXED.size + 8 * num_layers, _PAGE)


def _rows_offset(num_layers: int, num_experts: int) -> int:
    return round_up(_valid_offset(num_layers) + num_layers * num_experts, _PAGE)


class HostCache:
    """This process's mapping of the cache. The descriptor stays the caller's.

    An `ExpertSource`. `put` and `fetch` may be called from any thread.
    """

    name = "host"

    def __init__(self, fd: int, shapes: RowShapes) -> None:
        """Raises ValueError on a machine with weak store order, if `fd` is no such cache, or if its
        rows are too short for `shapes`.
        """
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ValueError(
                f"the host cache relies on the store order of x86: {platform.machine()}"
            )
        magic, num_layers, num_experts, row_bytes = _FIXED.unpack(os.pread(fd, _FIXED.size, 0))
        if magic != _MAGIC:
            raise ValueError("the descriptor is not a cache made by create_host_cache")
        self._fields, needed = _layout(shapes)
        if needed > row_bytes:
            raise ValueError(
                f"an expert takes {needed} bytes, and the cache's rows have {row_bytes}"
            )
        mapping = mmap.mmap(fd, 0)
        layers = struct.unpack_from(f"={num_layers}q", mapping, _FIXED.size)
        self._index = {LayerId(layer): i for i, layer in enumerate(layers)}
        self._num_experts, self._row_bytes = num_experts, row_bytes
        self._valid = memoryview(mapping)[_valid_offset(num_layers) :]
        self._rows = torch.frombuffer(mapping, dtype=torch.uint8)[
            _rows_offset(num_layers, num_experts) :
        ]

    def put(self, layer: LayerId, expert: ExpertId, params: Mapping[str, torch.Tensor]) -> None:
        """Keep an expert's rows, of any device. Does nothing if they are there already."""
        number = self._number(layer, expert)
        if self._valid[number]:
            return
        for name, view in self._views(number).items():
            assert params[name].shape == view.shape, f"{name}: {params[name].shape}"
            view.copy_(params[name].detach())
        self._valid[number] = 1  # last of all stores

    def fetch(self, layer: LayerId, expert: ExpertId) -> dict[str, torch.Tensor] | None:
        """Views of an expert's rows, to be read only; None if nobody has put them."""
        number = self._number(layer, expert)
        return self._views(number) if self._valid[number] else None

    def _number(self, layer: LayerId, expert: ExpertId) -> int:
        assert 0 <= expert < self._num_experts, f"expert {expert} of {self._num_experts}"
        return self._index[layer] * self._num_experts + expert

    def _views(self, number: int) -> dict[str, torch.Tensor]:
        row = self._rows[number * self._row_bytes : (number + 1) * self._row_bytes]
        return {
            name: row[start:end].view(dtype).view(shape)
            for name, start, end, shape, dtype in self._fields
        }


def _layout(
    shapes: RowShapes,
) -> tuple[list[tuple[str, int, int, tuple[int, ...], torch.dtype]], int]:
    """(name, first byte, end, shape, dtype) of each parameter in a row, and the bytes of all.

    Wider types first, so that every field is aligned.
    """
    fields, start = [], 0
    for name, (shape, dtype) in sorted(shapes.items(), key=lambda s: (-s[1][1].itemsize, s[0])):
        end = start + prod(shape) * dtype.itemsize
        fields.append((name, start, end, shape, dtype))
        start = end
    return fields, start
