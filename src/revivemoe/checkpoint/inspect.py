"""Learn what must be known of a checkpoint from its configuration and its files' headers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
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
    """Decoder layers with a plain gated feed-forward part instead of experts."""
    dense_width: int = 0
    """Inner width of these; 0 if there are none."""
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


def inspect_checkpoint(
    model_dir: Path, generation_config: str = AUTO, dequantize: bool = False
) -> CheckpointInfo:
    """Read the configuration, the safetensors headers, and which tokens end a text
    (`generation_config`: see `generation.end_token_ids`). `dequantize`: float8 weights are welcome.

    Raises ValueError, one line that says what is wrong and how to mend it, for a directory that is
    no checkpoint, a quantised or incomplete one, or a model without routed experts.
    """
    config = configuration.read_config(model_dir)
    quantised = quantization(model_dir)
    if quantised is not None and not dequantize:
        raise ValueError(
            f"{model_dir} is quantised ({quantised.method}): --dequantize turns its float8 weights "
            "back into --dtype on load, at twice their size or more; or use a bfloat16 or float32 "
            "one"
        )
    text = configuration.text_config(config)
    found = tensors(model_dir)
    architecture = str((config.architectures or ["unknown"])[0])
    num_layers = configuration.size(text, "num_hidden_layers", model_dir)
    layers, num_experts = _experts(found, num_layers)
    if not layers:
        if any("expert" in name for name in found):
            raise ValueError(
                f"{model_dir} ({architecture}) is not supported: its experts cannot be told apart "
                "by the names of its tensors"
            )
        raise ValueError(
            f"{model_dir} ({architecture}) has no routed experts: only Mixture-of-Experts "
            "checkpoints can be served"
        )
    configuration.refuse_states(text, model_dir)
    dense = {
        int(match.group(1)): tensor.shape[0]
        for name, tensor in found.items()
        if (match := _DENSE.fullmatch(name)) and int(match.group(1)) < num_layers
    }
    vocab_size = configuration.size(text, "vocab_size", model_dir)
    most, why = configuration.max_positions(text, model_dir)
    return CheckpointInfo(
        model_dir=model_dir,
        architecture=architecture,
        dtype=_dtype(configuration.dtype(config) or configuration.dtype(text), found),
        vocab_size=vocab_size,
        hidden_size=configuration.size(text, "hidden_size", model_dir),
        max_positions=most,
        top_k=configuration.top_k(text, model_dir),
        num_experts=num_experts,
        moe_layers=layers,
        dense_layers=tuple(sorted(dense)),
        dense_width=min(dense.values(), default=0),
        eos_token_ids=end_token_ids(
            generation_config, model_dir, {"eos_token_id": text.eos_token_id}, vocab_size
        ),
        num_parameters=sum(
            prod(tensor.shape) for name, tensor in found.items() if _below(name, num_layers)
        ),
        positions_end=why,
    )


def _experts(found: Mapping[str, TensorInfo], num_layers: int) -> tuple[tuple[int, ...], int]:
    """MoE layers and experts per layer, from per-expert or fused tensor names."""
    counts: dict[int, int] = {}
    for name, tensor in found.items():
        match = EXPERT_KEY.match(name)
        if match is None or int(match["layer"]) >= num_layers:
            continue
        layer, number = int(match["layer"]), match["rest"].partition(".")[0]
        count = int(number) + 1 if number.isdigit() else next(iter(tensor.shape), 0)
        counts[layer] = max(counts.get(layer, 0), count)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the layers have different numbers of experts ({sorted(set(counts.values()))}): "
            "such models are not supported, or the checkpoint is incomplete"
        )
    return tuple(sorted(counts)), max(counts.values(), default=0)


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
