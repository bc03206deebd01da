"""How a checkpoint's weights are quantised, where it is in a way that can be turned back on load:
float8 numbers, each to be multiplied by the scale of its block, row or tensor.

Two families write so: block FP8 (DeepSeek-V3, Qwen3-FP8: `weight_scale_inv`, which multiplies all
the same) and compressed-tensors (`weight_scale`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

SCALES = ("_scale_inv", "_scale")
"""What the name of a tensor's scale ends with, after the tensor's own name."""
FORMATS = (None, "dense", "float-quantized", "naive-quantized")
Block = tuple[int, int]


@dataclass(frozen=True)
class Quantization:
    method: str
    """As `config.json` names it."""
    block: Block | None = None
    """Rows and columns that share a scale, where the configuration says so."""


def quantization_of(raw: Mapping[str, object], model_dir: Path) -> Quantization | None:
    """From `config.json`; None: not quantised. ValueError, one line, for what is not read."""
    found = next(_sections(raw), None)
    if found is None:
        return None
    section = found if isinstance(found, dict) else {"quant_method": found}
    method = str(section.get("quant_method", "unknown"))
    try:
        if section is not found:
            raise ValueError("quantization_config is no object")
        if method == "fp8":
            return Quantization(method, _block(section.get("weight_block_size")))
        if method == "compressed-tensors":
            return Quantization(method, _compressed(section))
        raise ValueError("that cannot be read")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{model_dir} is quantised ({method[:80]}): {error}; only float8 weights in blocks, "
            "rows or whole tensors are supported (and turned back on load): use a bfloat16 or "
            "float32 one"
        ) from None


def scale_block(shape: tuple[int, ...], scale: tuple[int, ...], block: Block | None) -> Block:
    """Rows and columns of a weight that share a scale, by the shapes of both. Raises ValueError.

    The configuration's `block` may end beyond the weight; beside it, only rows or whole weights
    may have scales. Without it the scales must divide the weight evenly.
    """
    if prod(scale) == 1 and len(shape) >= 1:
        return (shape[-2] if len(shape) > 1 else 1, shape[-1])
    grid = scale_grid(shape, scale)
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        raise ValueError(f"scales of shape {list(scale)} do not fit weights of {list(shape)}")
    (rows, columns), (down, across) = shape[-2:], grid[-2:]
    if block is not None and (ceil(rows / block[0]), ceil(columns / block[1])) == (down, across):
        return block
    divided = down and across and not rows % down and not columns % across
    if not divided or (block is not None and (down not in (1, rows) or across != 1)):
        blocks = "" if block is None else f" in blocks of {list(block)}"
        raise ValueError(
            f"scales of shape {list(scale)} do not fit weights of {list(shape)}{blocks}"
        )
    return rows // down, columns // across


def scale_grid(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """The scales' shape with as many dimensions as the weight: those left out at the end are 1."""
    return scale + (1,) * (len(shape) - len(scale))


def _sections(raw: Mapping[str, object]) -> Iterator[object]:
    """Of the whole model, or of its decoder alone."""
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config"):
                if part.get(key):
                    yield part[key]


def _block(value: object) -> Block | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(n) is int and n > 0 for n in value)
    if not whole or not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"weight_block_size {str(value)[:80]} is not two whole numbers")
    return value[0], value[1]


def _compressed(section: Mapping[str, object]) -> Block | None:
    """The block of the scales. Raises ValueError for anything but float8 weights."""
    if section.get("format") not in FORMATS:
        raise ValueError(f"its format {str(section['format'])[:80]} cannot be read")
    if section.get("quantization_status") not in (None, "compressed"):
        raise ValueError("its weights are not stored in their compressed form")
    sparsity = section.get("sparsity_config")
    if section.get("transform_config") or (
        isinstance(sparsity, dict) and sparsity.get("format") not in FORMATS[:2]
    ):
        raise ValueError("its weights are transformed or sparse")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("it has no config_groups")
    blocks = {_weights_block(group) for group in groups.values()}
    if len(blocks) > 1:
        raise ValueError("its groups of layers have different blocks")
    return blocks.pop()


def _weights_block(group: Mapping[str, object]) -> Block | None:
    if group.get("format") not in FORMATS:
        raise ValueError(f"the format {str(group['format'])[:80]} cannot be read")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError("it does not say how its weights are quantised")
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True))
    if kind != ("float", 8, True) or weights.get("actorder"):
        raise ValueError(f"weights of type {str(kind[0])[:20]} with {str(kind[1])[:20]} bits")
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(n) for n in block.split("x")]
    return _block(block)
