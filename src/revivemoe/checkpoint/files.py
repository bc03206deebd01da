"""Which tensors a checkpoint's safetensors files hold, from their headers: no weights are read."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

EXPERT_KEY = re.compile(
    r"^(?P<head>(?:.*\.)?layers\.(?P<layer>\d+)\."
    r"(?:.*\bexperts|block_sparse_moe(?=\.(?:input|output)_linear\.))\.)"
    r"(?P<rest>(?!e_score_correction_bias$).+)$"  # the router's, wherever it is published
)
"""A tensor of one routed expert (`rest` begins with its number), or of all of a layer's in one."""

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
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F16, ..."""


def tensors(model_dir: Path, complete: bool = True) -> dict[str, TensorInfo]:
    """All tensors by name, as `transformers` finds them: in `model.safetensors`, or else in all
    shards that the index names, whatever it says of what lies where.

    Raises ValueError, one line, for shards that are missing, cut short or empty, and, where it
    must be `complete`, for tensors that the index names and no shard holds.
    """
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
