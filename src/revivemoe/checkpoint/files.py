"""Which tensors a checkpoint's safetensors files hold, from their headers: no weights are read."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
    own, but belong to those that they scale.

    Raises ValueError, one line, for shards that are missing, cut short or empty, for float8 numbers
    without scales that fit, and, where it must be `complete`, for tensors that the index names and
    no shard holds.
    """
    return _scaled(_stored(model_dir, complete), quantization(model_dir), model_dir)


def quantization(model_dir: Path) -> Quantization | None:
    """Raises ValueError, one line, for what is quantised in a way that is not read."""
    return quantization_of(raw_config(model_dir), model_dir)


def _scaled(
    stored: dict[str, TensorInfo], quantised: Quantization | None, model_dir: Path
) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, tensor in stored.items():
        if tensor.dtype.startswith("F8_") and not name.endswith(SCALES):
            found[name] = _with_scale(name, tensor, stored, quantised, model_dir)
        elif quantised is None or not name.endswith(SCALES):
            found[name] = tensor
    return found


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
            if length > size - 8:
                raise ValueError("header is longer than the file")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        end = max((e["data_offsets"][1] for e in entries.values()), default=0)
        if 8 + length + end > size:
            raise ValueError("it is cut short (an interrupted download?)")
        return {
            name: TensorInfo(file, tuple(entry["shape"]), str(entry["dtype"]))
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint is incomplete") from None
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {_named(error)}") from None


def _named(error: Exception) -> str:
    """A KeyError alone would say no more than a word."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)
