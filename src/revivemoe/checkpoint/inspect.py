"""Learn what must be known of a checkpoint from its files' headers: no torch, no weights read."""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from revivemoe.checkpoint.generation import AUTO, end_token_ids

_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight")
_EXPERT = re.compile(r"\.layers\.(\d+)\..*\bexperts\.(?:(\d+)\.)?")

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
class CheckpointInfo:
    model_dir: Path
    architecture: str
    dtype: str
    """float32 | bfloat16: the checkpoint's own, where it is one of these."""
    vocab_size: int
    hidden_size: int
    max_positions: int
    top_k: int
    num_experts: int
    moe_layers: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    dense_layers: tuple[int, ...] = ()
    """Decoder layers with a plain gated feed-forward part instead of experts."""
    dense_width: int = 0
    """Inner width of these; 0 if there are none."""


def inspect_checkpoint(model_dir: Path, generation_config: str = AUTO) -> CheckpointInfo:
    """Read `config.json`, the safetensors headers, and which tokens end a text
    (`generation_config`: see `generation.end_token_ids`).

    Raises ValueError, one line that says what is wrong and how to mend it, for a directory that is
    no checkpoint, a quantised or incomplete one, or a model without routed experts.
    """
    config = _config(model_dir)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, Sequence) and named else "unknown"
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is not None:
        known = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        method = known.get("quant_method", "unknown")
        raise ValueError(
            f"{model_dir} is quantised ({method}): quantised checkpoints are not supported yet; "
            "use a bfloat16 or float32 one"
        )
    shapes = _tensor_shapes(model_dir)
    num_layers = _size(config, "num_hidden_layers")
    layers, num_experts = _experts(shapes, num_layers)
    dense = {
        int(match.group(1)): shape[0]
        for name, shape in shapes.items()
        if (match := _DENSE.fullmatch(name)) and int(match.group(1)) < num_layers
    }
    if not layers:
        raise ValueError(
            f"{model_dir} ({architecture}) has no routed experts: only Mixture-of-Experts "
            "checkpoints can be served"
        )
    vocab_size = _size(config, "vocab_size")
    return CheckpointInfo(
        model_dir=model_dir,
        architecture=architecture,
        dtype=_dtype(config),
        vocab_size=vocab_size,
        hidden_size=_size(config, "hidden_size"),
        max_positions=_size(config, "max_position_embeddings", 4096),
        top_k=_top_k(config, model_dir),
        num_experts=num_experts,
        moe_layers=layers,
        dense_layers=tuple(sorted(dense)),
        dense_width=min(dense.values(), default=0),
        eos_token_ids=end_token_ids(generation_config, model_dir, config, vocab_size),
    )


def _config(model_dir: Path) -> dict[str, object]:
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise ValueError(
            f"{model_dir} is not a directory: give a local checkpoint in the Hugging Face layout "
            "('revivemoe make-model DIR' makes one)"
        )
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{model_dir} has no config.json: not a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object: not a Hugging Face checkpoint")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not _is_int(config.get(key)):
            raise ValueError(f"{path} has no {key}: only text-only decoder models can be served")
    if not _is_int(config.get("max_position_embeddings", 4096)):
        raise ValueError(f"{path}: max_position_embeddings is not a whole number: correct it")
    return config


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(config: dict[str, object], key: str, default: int | None = None) -> int:
    """A field that `_config` has seen to be a whole number."""
    value = config.get(key, default)
    assert _is_int(value), f"{key} was not checked"
    return value


def _tensor_shapes(model_dir: Path) -> dict[str, list[int]]:
    """Tensor name to shape over all shards, from their headers."""
    files = sorted(model_dir.glob("*.safetensors"))
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [model_dir / name for name in sorted(names)]
        except _UNREADABLE as error:
            raise ValueError(f"{index} cannot be read: {error}") from None
    if not files:
        raise ValueError(
            f"{model_dir} holds no .safetensors files: convert the checkpoint with "
            "save_pretrained first"
        )
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes.update(_header(file))
    return shapes


def _header(file: Path) -> dict[str, list[int]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError("header is longer than the file")
            entries = json.loads(handle.read(length))
        end = max(
            (e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0
        )
        if 8 + length + end > size:
            raise ValueError("it is cut short (an interrupted download?)")
        return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint is incomplete") from None
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _experts(shapes: dict[str, list[int]], num_layers: int) -> tuple[tuple[int, ...], int]:
    """MoE layers and experts per layer, from per-expert or fused tensor names."""
    counts: dict[int, int] = {}
    for name, shape in shapes.items():
        match = _EXPERT.search(name)
        if match is None or int(match.group(1)) >= num_layers:
            continue
        layer = int(match.group(1))
        found = int(match.group(2)) + 1 if match.group(2) is not None else shape[0]
        counts[layer] = max(counts.get(layer, 0), found)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the layers have different numbers of experts ({sorted(set(counts.values()))}): "
            "such models are not supported, or the checkpoint is incomplete"
        )
    return tuple(sorted(counts)), max(counts.values(), default=0)


def _top_k(config: dict[str, object], model_dir: Path) -> int:
    for key in ("num_experts_per_tok", "moe_top_k", "num_experts_per_token", "moe_topk"):
        if _is_int(value := config.get(key)):
            return value
    raise ValueError(f"{model_dir}/config.json does not say how many experts a token uses")


def _dtype(config: dict[str, object]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return "float32" if name == "float32" else "bfloat16"
