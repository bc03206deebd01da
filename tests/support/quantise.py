"""Float8 checkpoints from plain ones, as they are published, and what they stand for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LEFT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")
"""What everybody leaves as it is."""


@dataclass(frozen=True)
class Scheme:
    config: dict[str, object]
    """`quantization_config`."""
    suffix: str
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: all of a tensor."""
    flat: bool = False
    """Scales without the dimensions of 1 at their end."""
    dtype: torch.dtype = torch.float32
    """Of the scales."""


def block_fp8(rows: int, columns: int) -> Scheme:
    """As DeepSeek-V3 and Qwen3-FP8 write it."""
    config: dict[str, object] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }
    return Scheme(config, "_scale_inv", (rows, columns))


def compressed(strategy: str, block: tuple[int, int] | None, flat: bool = False) -> Scheme:
    """As llm-compressor writes it."""
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy}
    if block is not None and block[0] > 1:
        weights["block_structure"] = list(block)
    config: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return Scheme(config, "_scale", block, flat, torch.bfloat16)


def quantise(plain: Path, target: Path, scheme: Scheme) -> Path:
    """A float8 copy of a checkpoint."""
    return _rewritten(plain, target, scheme, lambda name, w: _stored(name, w, scheme))


def as_meant(plain: Path, target: Path, scheme: Scheme) -> Path:
    """The plain checkpoint that the float8 one stands for: its twin."""
    return _rewritten(plain, target, None, lambda name, w: {name: _parts(w, scheme)[2]})


def _rewritten(
    plain: Path, target: Path, scheme: Scheme | None, change: Callable[[str, torch.Tensor], Tensors]
) -> Path:
    shutil.copytree(plain, target)
    weight_map = {}
    for shard in sorted(target.glob("*.safetensors")):
        state: Tensors = {}
        for name, tensor in load_file(shard).items():
            left = tensor.dim() < 2 or any(part in name for part in LEFT)
            state.update({name: tensor} if left else change(name, tensor))
        save_file(state, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, shard.name)
    index = target / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if scheme is not None:
        path = target / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": scheme.config}
        path.write_text(json.dumps(config))
    return target


def _stored(name: str, weight: torch.Tensor, scheme: Scheme) -> Tensors:
    numbers, scales, _ = _parts(weight, scheme)
    if scheme.flat:
        scales = scales.reshape(-1) if scheme.block is None else scales.squeeze(-1)
    return {name: numbers, name + scheme.suffix: scales.contiguous()}


def _parts(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """Float8 numbers, their scales, and the product."""
    rows, columns = weight.shape[-2:]
    high, wide = scheme.block or (rows, columns)
    high, wide = min(high, rows), min(wide, columns)
    down, across = ceil(rows / high), ceil(columns / wide)
    most = torch.finfo(torch.float8_e4m3fn).max
    scales = torch.empty(*weight.shape[:-2], down, across)
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    for i in range(down):
        for j in range(across):
            at = (..., slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            part = weight[at].float()
            scale = (part.abs().amax((-2, -1), keepdim=True) / most).to(scheme.dtype).float()
            numbers[at] = (part / scale).clamp(-most, most).to(numbers.dtype)
            scales[..., i : i + 1, j : j + 1] = scale
            meant[at] = numbers[at].float() * scale
    return numbers, scales.to(scheme.dtype), meant
