"""A checkpoint's configuration as `transformers` understands it: defaults filled in, old names
translated, and what was left over from training or debugging switched off.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revivemoe.checkpoint.quantization import quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORCED = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
    "gradient_checkpointing": False,
}
"""What would change how a model is called or what it returns. Dropout and router noise need not be
here: no model applies them outside training."""

TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "moe_k",
)
"""What the families call the number of experts a token uses."""

PAGED = ("full_attention", "sliding_attention", "attention")
"""Kinds of layers whose keys and values are all that they keep."""


def read_config(model_dir: Path) -> "PreTrainedConfig":
    """Of the model with plain weights, however they are stored. Raises ValueError, one line, for
    what is no checkpoint, quantised in a way that is not read, or not understood.
    """
    path = model_dir / "config.json"
    raw = raw_config(model_dir)
    quantization_of(raw, model_dir)
    if not raw.get("model_type"):
        raise ValueError(f"{path} has no model_type: say what family the checkpoint belongs to")
    config = _parsed(path)
    for part in _parts(config):
        for name, value in FORCED.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # what is built holds weights turned back
    return config


def text_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Of the decoder that generates text, where a model has other parts too."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def size(config: "PreTrainedConfig", name: str, path: Path | str) -> int:
    """A whole number above 0 by its common name (`attribute_map` translates). ValueError."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{path}/config.json has no {name} ({repr(value)[:80]}): only text-only decoder models "
            "can be served"
        )
    return value


def top_k(config: "PreTrainedConfig", model_dir: Path) -> int:
    """Experts a token uses: the same in every layer. Raises ValueError."""
    for name in TOP_K:
        value = getattr(config, name, None)
        given = value if isinstance(value, list) and value else [value]
        values = {v for v in given if isinstance(v, int) and not isinstance(v, bool)}
        if len(values) > 1:
            raise ValueError(f"{model_dir}: layers with different {name} are not supported")
        if values:
            return values.pop()
    raise ValueError(f"{model_dir}/config.json does not say how many experts a token uses")


def refuse_states(config: "PreTrainedConfig", model_dir: Path) -> None:
    """Raises ValueError for layers that keep something other than keys and values."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted({str(kind) for kind in kinds} - set(PAGED))
    if others:
        raise ValueError(
            f"{model_dir} ({config.model_type}) has layers of {', '.join(others)}: only attention "
            "over all keys and values, or over a sliding window of them, is supported"
        )


def max_positions(config: "PreTrainedConfig", model_dir: Path | str) -> tuple[int, str]:
    """How long a text may become, and why not longer (empty: as the configuration says).

    `dynamic` and `longrope` turn every position by other angles once the longest text of a batch
    is beyond the original length. Up to there nobody's numbers depend on anybody else's.
    """
    value = getattr(config, "max_position_embeddings", None)
    most = 4096 if value is None else size(config, "max_position_embeddings", model_dir)
    reason = ""
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        original = rope.get("original_max_position_embeddings")
        original = original if isinstance(original, int) and original > 0 else most
        if kind == "yarn" and isinstance(rope.get("factor"), int | float):
            most = max(most, int(original * rope["factor"]))
        elif kind == "longrope" or "dynamic" in kind:
            most = min(most, original) if kind == "longrope" else most
            reason = f"; beyond them {kind} rope scaling would make requests change one another"
    return most, reason


def dtype(config: "PreTrainedConfig") -> str | None:
    """float32, bfloat16, ...; None if the configuration does not say."""
    found = getattr(config, "dtype", None)
    return None if found is None else str(found).removeprefix("torch.")


def _ropes(config: "PreTrainedConfig") -> Iterator[dict[str, Any]]:
    """Rope parameters: of the model, or of each kind of its layers."""
    found = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in found.values()):
        yield from (value for value in found.values() if isinstance(value, dict))
    else:
        yield found


def _parts(config: "PreTrainedConfig") -> list["PreTrainedConfig"]:
    text = text_config(config)
    return [config] if text is config else [config, text]


def raw_config(model_dir: Path) -> dict[str, object]:
    """`config.json` as it stands. Raises ValueError, one line."""
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise ValueError(
            f"{model_dir} is not a directory: give a local checkpoint in the Hugging Face layout "
            "('revivemoe make-model DIR' makes one), or ORG/NAME of the hub"
        )
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{model_dir} has no config.json: not a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object: not a Hugging Face checkpoint")
    return raw


def _parsed(path: Path) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    refusals = (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError)
    try:
        config = AutoConfig.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        )
    except refusals as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: {said or type(error).__name__}") from None
    return config
