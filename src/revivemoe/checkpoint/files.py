"""Which tensors a checkpoint's safetensors files hold, from their headers: no weights are read."""

import json
import re
import struct
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeGuard

from revivemoe.checkpoint.config import raw_config
from revivemoe.checkpoint.quantization import (
    SCALES,
    Block,
    Quantization,
    quantization_of,
    scale_block,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

EXPERT_KEY = re.compile(
    r"^(?P<head>(?:.*\.)?layers\.(?P<layer>\d+)\."
    r"(?:.*\bexperts|block_sparse_moe(?=\.(?:input|output)_linear\.))\.)"
    r"(?P<rest>(?!e_score_correction_bias$).+)$"  # the router's, wherever it is published
)
"""A tensor of one routed expert (`rest` begins with its number), or of all of a layer's in one."""

_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_\w+)?(?:\.|$)")
"""Parts for multi-token prediction that stand beside the decoder's layers. Nobody loads them, and
their own layers 0, 1, ... are not the decoder's."""

_OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale")
_OTHER_SCALES = tuple(f".{n}" for n in (*_OF_ACTIVATIONS, "k_scale", "v_scale", "q_scale"))
"""Of quantised activations and caches: of no use where neither is quantised."""

MAX_HEADER_BYTES = 100_000_000
"""As `safetensors` has it."""

MAX_NAME = 1000
MAX_DIMENSIONS = 64
"""As `torch` has it."""
NUMBERS_END = 1 << 63
"""No tensor has as many numbers."""

FLOATS = ("F64", "F32", "BF16", "F16")
_TYPES_OF_BYTES = {
    8: "F64 I64 U64 C64",
    4: "F32 I32 U32",
    2: "BF16 F16 I16 U16",
    1: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
}
BYTES = {dtype: size for size, dtypes in _TYPES_OF_BYTES.items() for dtype in dtypes.split()}
"""Of a number, by its type. There are others, which nobody reads."""
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")

_UNREADABLE = (
    OSError,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""What comes of a file whose content is not what it should be."""


@dataclass(frozen=True)
class ScaleInfo:
    """Where a tensor's scales are, and how many of its rows and columns share one."""

    name: str
    file: Path
    block: Block


@dataclass(frozen=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F16, ..."""
    scale: ScaleInfo | None = None
    """What its numbers are to be multiplied by."""


def tensors(model_dir: Path, complete: bool = True) -> dict[str, TensorInfo]:
    """All tensors by name, as `transformers` finds them: in `model.safetensors`, or else in all
    shards that the index names, whatever it says of what lies where. Scales are no tensors of their
    own, but belong to those that they scale; parts for multi-token prediction are left out.

    Raises ValueError, one line, for shards that are missing, cut short or empty, for float8 numbers
    without scales that fit, and, where it must be `complete`, for tensors that the index names and
    no shard holds.
    """
    stored = _stored(model_dir, complete)
    ours = {name: tensor for name, tensor in stored.items() if not _is_prediction(name)}
    return _scaled(ours, quantization(model_dir), model_dir)


def missing_files(model_dir: Path) -> list[str]:
    """Files of weights that are not there, by name; where one of two would do, both. Raises
    ValueError for an index that cannot be read.
    """
    if (model_dir / SINGLE).is_file():
        return []
    if not (model_dir / INDEX).is_file():
        return [SINGLE, INDEX]
    shards = sorted(set(_index(model_dir / INDEX).values()))
    return [name for name in shards if not (model_dir / name).is_file()]


def quantization(model_dir: Path) -> Quantization | None:
    """Raises ValueError, one line, for what is quantised in a way that is not read."""
    return quantization_of(raw_config(model_dir), model_dir)


def _is_prediction(name: str) -> bool:
    beside, _, _ = name.partition(".layers.")
    return _PREDICTION.search(beside) is not None


def _scaled(
    stored: dict[str, TensorInfo], quantised: Quantization | None, model_dir: Path
) -> dict[str, TensorInfo]:
    scales = _scales(stored)
    _refuse_whole_numbers(stored, scales, model_dir)
    if quantised is None:
        scales = set()
    return {
        name: _with_scale(name, tensor, stored, quantised, model_dir)
        if tensor.dtype.startswith("F8_")
        else tensor
        for name, tensor in stored.items()
        if name not in scales
    }


def _refuse_whole_numbers(
    stored: Mapping[str, TensorInfo], scales: Set[str], model_dir: Path
) -> None:
    """Raises ValueError for weights whose bytes would be read as if they were their values: float8
    ones that another tool has stored as integers, or ones that are quantised to these.
    """
    for name, tensor in stored.items():
        if tensor.dtype.startswith("F8_") or tensor.dtype in FLOATS or name in scales:
            continue
        scale = next((name + end for end in SCALES if name + end in stored), None)
        if scale is not None or name.endswith(".weight") or EXPERT_KEY.match(name):
            beside = "" if scale is None else f", with {scale} beside it"
            raise ValueError(
                f"{model_dir}: {name} is stored as {tensor.dtype[:20]}{beside}: weights are read "
                "where they are floating-point numbers, float8 (F8_E4M3) with their scales among "
                "them: convert the checkpoint"
            )


def _scales(stored: Mapping[str, TensorInfo]) -> set[str]:
    """Names that belong to float8 tensors, or to activations and caches. Other parameters may be
    called scales, too (a router's).
    """
    ends = (*SCALES, *(f"_{end}" for end in _OF_ACTIVATIONS))
    numbers = [name for name, tensor in stored.items() if tensor.dtype.startswith("F8_")]
    owned = {name + end for name in numbers for end in ends}
    return owned | {name for name in stored if name.endswith(_OTHER_SCALES)}


def _with_scale(
    name: str,
    tensor: TensorInfo,
    stored: Mapping[str, TensorInfo],
    quantised: Quantization | None,
    model_dir: Path,
) -> TensorInfo:
    if quantised is None:
        raise ValueError(
            f"{model_dir}: {name} is stored in float8, and config.json says nothing of a "
            "quantisation: convert the checkpoint to bfloat16"
        )
    scale = next((name + end for end in SCALES if name + end in stored), None)
    if scale is None:
        raise ValueError(f"{model_dir} lacks the scales of {name}: the checkpoint is incomplete")
    of = stored[scale]
    try:
        if of.dtype not in SCALE_DTYPES:
            raise ValueError(f"scales of type {of.dtype} are not supported")
        block = scale_block(tensor.shape, of.shape, quantised.block)
    except ValueError as error:
        raise ValueError(f"{model_dir}: {name}: {error}") from None
    return replace(tensor, scale=ScaleInfo(scale, of.file, block))


def _stored(model_dir: Path, complete: bool) -> dict[str, TensorInfo]:
    if (model_dir / SINGLE).is_file():
        return _header(model_dir / SINGLE)
    weight_map = _index(model_dir / INDEX)
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        found.update(_header(model_dir / name))
    for tensor, name in weight_map.items():
        if complete and tensor not in found:
            raise ValueError(
                f"{model_dir / name} lacks {tensor}, which {INDEX} says it holds: the checkpoint "
                "is incomplete"
            )
    return found


def _index(path: Path) -> Mapping[str, str]:
    """Tensor name to the name of its shard."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("it names files outside the checkpoint")
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} holds neither {SINGLE} nor {INDEX}: there are no .safetensors files "
            "that could be loaded; convert the checkpoint with save_pretrained first"
        ) from None
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {_named(error)}") from None
    if not weight_map:
        raise ValueError(f"{path} names no tensors: the checkpoint is incomplete")
    assert isinstance(weight_map, dict)
    return weight_map


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            if size < 8:
                raise ValueError("it is empty or cut short (an interrupted download?)")
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("header is longer than the file, or than any may be")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        found = {name: _tensor(file, name, entry) for name, entry in entries.items()}
        end = _laid_out(found, {name: e["data_offsets"] for name, e in entries.items()})
        if 8 + length + end > size:
            raise ValueError("it is cut short (an interrupted download?)")
        if 8 + length + end < size:
            raise ValueError("it goes on behind its last tensor: damaged?")
        return found
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint is incomplete") from None
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {_named(error)}") from None


def _tensor(file: Path, name: str, entry: Mapping[str, object]) -> TensorInfo:
    if len(name) > MAX_NAME or not name.isascii():
        raise ValueError(f"the name {name[:80]!r} ... is no parameter's: damaged?")
    shape, dtype = entry["shape"], entry["dtype"]
    if not _is_shape(shape) or not isinstance(dtype, str):
        raise ValueError(
            f"{name[:80]} has shape {repr(shape)[:80]} and type {repr(dtype)[:80]}: damaged?"
        )
    return TensorInfo(file, tuple(shape), dtype)


def _laid_out(tensors: Mapping[str, TensorInfo], offsets: Mapping[str, list[int]]) -> int:
    """Where the last one ends. As `safetensors` has it each begins where the one before it ends,
    and is as long as its numbers are. Raises ValueError.
    """
    last = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda one: one[1]):
        size, count = BYTES.get(tensors[name].dtype), prod(tensors[name].shape)
        fits = size is None or end - begin == size * count
        if begin != last or end < begin or not fits:
            where = f"{begin} to {end}"[:80]
            raise ValueError(f"{name[:80]} lies where it cannot ({where}): damaged?")
        last = end
    return last


def _is_shape(value: object) -> TypeGuard[list[int]]:
    """Of a tensor that there can be: any count of its numbers is one of 64 bits."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    sizes = all(type(n) is int and 0 <= n < NUMBERS_END for n in value)
    return sizes and prod(value) < NUMBERS_END


def _named(error: Exception) -> str:
    """A KeyError alone would say no more than a word."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)
