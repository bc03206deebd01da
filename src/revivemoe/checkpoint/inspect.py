"""Learn what must be known of a checkpoint from its configuration and its files' headers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path

from revivemoe.checkpoint import config as configuration
from revivemoe.checkpoint.files import EXPERT_KEY, TensorInfo, quantization, tensors
from revivemoe.checkpoint.generation import AUTO, end_token_ids

_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class CheckpointInfo:
    model_dir: Path
    architecture: str
    dtype: str
    """float32 | bfloat16 | float16: the checkpoint's own, where it is one of these."""
    vocab_size: int
    hidden_size: int
    max_positions: int
    top_k: int
    num_experts: int
    moe_layers: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    dense_layers: tuple[int, ...] = ()
    """Decoder layers with a plain gated feed-forward part instead of experts: not beside them."""
    dense_width: int = 0
    """What divides the inner width of each of these, at most; 0 if there are none."""
    num_parameters: int = 0
    """Of all its tensors."""
    positions_end: str = ""
    """Why `max_positions` is less than what the configuration says, if it is."""

    def ending_with(self, token_id: int | None) -> "CheckpointInfo":
        """The tokenizer's own end of text ends a text too, as in vLLM."""
        if token_id is None or not 0 <= token_id < self.vocab_size:
            return self
        ids = dict.fromkeys((*self.eos_token_ids, token_id))
        return replace(self, eos_token_ids=tuple(ids))


@dataclass(frozen=True)
class ConfigInfo:
    """What the configuration alone says; fields as in `CheckpointInfo`."""

    architecture: str
    dtype: str | None
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    positions_end: str
    top_k: int
    num_experts: int | None
    eos_token_ids: tuple[int, ...]


def inspect_config(
    model_dir: Path, generation_config: str = AUTO, dequantize: bool = False
) -> ConfigInfo:
    """What can be known, and refused, before there are any weights; as `inspect_checkpoint`.

    Raises ValueError, one line.
    """
    config = configuration.read_config(model_dir)
    quantised = quantization(model_dir)
    if quantised is not None and not dequantize:
        raise ValueError(
            f"{model_dir} is quantised ({quantised.method}): --dequantize turns its float8 weights "
            "back into --dtype on load, at twice their size or more; or use a bfloat16 or float32 "
            "one"
        )
    with configuration.in_one_line(model_dir / "config.json"):
        text = configuration.text_config(config)
        configuration.refuse_states(text, model_dir)
        configuration.refuse_zero_experts(text, model_dir)
        vocab_size = configuration.size(text, "vocab_size", model_dir)
        most, why = configuration.max_positions(text, model_dir)
        said = (getattr(part, "eos_token_id", None) for part in (config, text))
        ends = next((ids for ids in said if ids is not None), None)
        return ConfigInfo(
            architecture=configuration.architecture(config, model_dir),
            dtype=configuration.dtype(config) or configuration.dtype(text),
            vocab_size=vocab_size,
            hidden_size=configuration.size(text, "hidden_size", model_dir),
            num_layers=configuration.size(text, "num_hidden_layers", model_dir),
            max_positions=most,
            positions_end=why,
            top_k=configuration.top_k(text, model_dir),
            num_experts=configuration.num_experts(text),
            eos_token_ids=end_token_ids(
                generation_config, model_dir, {"eos_token_id": ends}, vocab_size
            ),
        )


def inspect_checkpoint(
    model_dir: Path, generation_config: str = AUTO, dequantize: bool = False
) -> CheckpointInfo:
    """Read the configuration, the safetensors headers, and which tokens end a text
    (`generation_config`: see `generation.end_token_ids`). `dequantize`: float8 weights are welcome.

    Raises ValueError, one line that says what is wrong and how to mend it, for a directory that is
    no checkpoint, a quantised or incomplete one, or a model without routed experts.
    """
    said = inspect_config(model_dir, generation_config, dequantize)
    found = tensors(model_dir)
    layers, num_experts = _experts(found, said, model_dir)
    if said.top_k > num_experts:
        raise ValueError(
            f"{model_dir}/config.json: a token uses {said.top_k} experts, and a layer has "
            f"{num_experts}: correct it"
        )
    widths = dict(_dense_widths(found, said.num_layers, model_dir))
    dense = sorted(widths.keys() - set(layers))
    return CheckpointInfo(
        model_dir=model_dir,
        architecture=said.architecture,
        dtype=_dtype(said.dtype, found),
        vocab_size=said.vocab_size,
        hidden_size=said.hidden_size,
        max_positions=said.max_positions,
        top_k=said.top_k,
        num_experts=num_experts,
        moe_layers=layers,
        dense_layers=tuple(dense),
        dense_width=gcd(*(widths[layer] for layer in dense)),
        eos_token_ids=said.eos_token_ids,
        num_parameters=sum(
            prod(tensor.shape) for name, tensor in found.items() if _below(name, said.num_layers)
        ),
        positions_end=said.positions_end,
    )


def _dense_widths(
    found: Mapping[str, TensorInfo], num_layers: int, model_dir: Path
) -> Iterator[tuple[int, int]]:
    """Layer and inner width of each plain gated feed-forward part."""
    for name, tensor in found.items():
        match = _DENSE.fullmatch(name)
        if match is None or int(match.group(1)) >= num_layers:
            continue
        if len(tensor.shape) != 2 or not all(tensor.shape):
            raise ValueError(
                f"{model_dir}: {name} has shape {list(tensor.shape)}, which is no matrix: the "
                "checkpoint is damaged"
            )
        yield int(match.group(1)), tensor.shape[0]


def _experts(
    found: Mapping[str, TensorInfo], said: ConfigInfo, model_dir: Path
) -> tuple[tuple[int, ...], int]:
    """MoE layers and experts per layer, from per-expert or fused tensor names. Raises ValueError.

    They are counted, not believed: what an expert is called must not cost memory or time. Of a
    tensor for all experts the ranks know whether the model has as many.
    """
    numbers: dict[int, set[int]] = {}
    counts: dict[int, int] = {}
    heads: set[str] = set()
    for name, tensor in found.items():
        match = EXPERT_KEY.match(name)
        if match is None or int(match["layer"]) >= said.num_layers:
            continue
        heads.add(match["head"].partition("layers.")[0])
        layer, number = int(match["layer"]), match["rest"].partition(".")[0]
        if number.isdigit():
            numbers.setdefault(layer, set()).add(int(number))
        else:
            counts[layer] = max(counts.get(layer, 0), next(iter(tensor.shape), 0))
    _refuse_experts(found, heads, said, model_dir)
    for layer, those in numbers.items():
        counts[layer] = max(counts.get(layer, 0), len(those))
        if max(those) >= counts[layer]:
            raise ValueError(
                f"{model_dir}: layer {layer} has {len(those)} experts, numbered up to "
                f"{str(max(those))[:20]}: the checkpoint is incomplete or damaged"
            )
    each = sorted(set(counts.values()))
    if len(each) > 1:
        raise ValueError(
            f"{model_dir}: the layers have different numbers of experts ({each}): "
            "such models are not supported, or the checkpoint is incomplete"
        )
    if numbers and said.num_experts is not None and each != [said.num_experts]:
        raise ValueError(
            f"{model_dir} holds {each[0]} experts in each layer, and its config.json says "
            f"{said.num_experts}: the checkpoint is incomplete, or its config.json another one's"
        )
    return tuple(sorted(counts)), each[0]


def _refuse_experts(
    found: Mapping[str, TensorInfo], heads: set[str], said: ConfigInfo, model_dir: Path
) -> None:
    """Raises ValueError for none, and for those of two decoders."""
    if len(heads) > 1:
        raise ValueError(
            f"{model_dir} ({said.architecture}) is not supported: its experts belong to more than "
            f"one decoder ({', '.join(sorted(heads))[:200]})"
        )
    if not heads and any("expert" in name for name in found):
        raise ValueError(
            f"{model_dir} ({said.architecture}) is not supported: its experts cannot be told apart "
            "by the names of its tensors"
        )
    if not heads:
        raise ValueError(
            f"{model_dir} ({said.architecture}) has no routed experts: only Mixture-of-Experts "
            "checkpoints can be served"
        )


def _below(name: str, num_layers: int) -> bool:
    """Not of the layers behind the decoder (multi-token prediction)."""
    match = _LAYER.search(name)
    return match is None or int(match.group(1)) < num_layers


def _dtype(said: str | None, found: Mapping[str, TensorInfo]) -> str:
    """What the configuration says, else the first floating-point tensor's, as `transformers` does;
    bfloat16 for what is none of ours.
    """
    first = (_DTYPES[t.dtype] for t in found.values() if t.dtype in _DTYPES)
    name = said or next(first, "bfloat16")
    return name if name in _DTYPES.values() else "bfloat16"
