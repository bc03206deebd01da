"""A checkpoint's configuration as `transformers` understands it: defaults filled in, old names
translated, and what was left over from training or debugging switched off.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
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

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What they call the number of a layer's experts."""

ZERO_EXPERTS = "zero_expert_num"

PAGED = ("full_attention", "sliding_attention", "attention")
"""Kinds of layers whose keys and values are all that they keep."""

MSCALES = {"short_mscale", "long_mscale"}
"""Rope parameters of Phi's MoE: it scales by the longest text, whatever the kind of scaling."""


def read_config(model_dir: Path) -> "PreTrainedConfig":
    """Of the model with plain weights, however they are stored. Raises ValueError, one line, for
    what is no checkpoint, quantised in a way that is not read, or not understood.
    """
    path = model_dir / "config.json"
    raw = raw_config(model_dir)
    quantization_of(raw, model_dir)
    if not raw.get("model_type"):
        raise ValueError(f"{path} has no model_type: say what family the checkpoint belongs to")
    if raw.get("transformers_weights") is not None:
        raise ValueError(
            f"{path} names weights of its own (transformers_weights), which is not supported: "
            "remove it if they lie in model.safetensors or its shards"
        )
    with in_one_line(path):
        config = _parsed(path)
        for part in _parts(config):
            for name, value in FORCED.items():
                if getattr(part, name, value) != value:
                    setattr(part, name, value)
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config  # what is built holds weights turned back
    return config


@contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """Whatever comes of a configuration that is not ours becomes a ValueError of one line: in here
    runs others' code on others' values.
    """
    try:
        yield
    except Exception as error:
        said = str(error)
        if isinstance(error, ValueError) and str(path.parent) in said and "\n" not in said:
            raise
        said = " ".join(said.split())[:300]
        raise ValueError(f"{path}: {type(error).__name__}: {said}") from None


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


def architecture(config: "PreTrainedConfig", model_dir: Path) -> str:
    """The class that it names. Raises ValueError."""
    named = config.architectures or ["unknown"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(
            f"{model_dir}/config.json: architectures {repr(named)[:80]} is no list of names: "
            "correct it"
        )
    return named[0]


def top_k(config: "PreTrainedConfig", model_dir: Path) -> int:
    """Experts a token uses: the same in every layer. Raises ValueError."""
    for name in TOP_K:
        value = getattr(config, name, None)
        given = value if isinstance(value, list) and value else [value]
        values = {v for v in given if isinstance(v, int) and not isinstance(v, bool)}
        if len(values) > 1:
            raise ValueError(f"{model_dir}: layers with different {name} are not supported")
        if values and min(values) < 1:
            raise ValueError(f"{model_dir}/config.json: {name} {min(values)} is less than 1")
        if values:
            return values.pop()
    raise ValueError(
        f"{model_dir}/config.json ({config.model_type}) names no routed experts: only "
        "Mixture-of-Experts checkpoints can be served"
    )


def num_experts(config: "PreTrainedConfig") -> int | None:
    """Of a layer, under a name that the family itself uses; None if there is no such number."""
    family = type(config)
    for name in NUM_EXPERTS:
        if name in family.attribute_map or hasattr(family, name):
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def refuse_states(config: "PreTrainedConfig", model_dir: Path) -> None:
    """Raises ValueError for layers that keep something other than keys and values."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted({str(kind) for kind in kinds} - set(PAGED))
    if others:
        raise ValueError(
            f"{model_dir} ({config.model_type}) has layers of {', '.join(others)}: only attention "
            "over all keys and values, or over a sliding window of them, is supported"
        )


def refuse_zero_experts(config: "PreTrainedConfig", model_dir: Path) -> None:
    """Raises ValueError for experts without weights, which give back what they are given: routers
    know them, and nobody holds them.
    """
    count = getattr(config, ZERO_EXPERTS, None)
    if isinstance(count, int) and count > 0:
        raise ValueError(
            f"{model_dir} ({config.model_type}) has {count} zero experts in each layer "
            f"({ZERO_EXPERTS}), which give back what they are given: such experts are not served"
        )


def max_positions(config: "PreTrainedConfig", model_dir: Path | str) -> tuple[int, str]:
    """How long a text may become, and why not longer (empty: as the configuration says).

    `dynamic` and `longrope` turn every position by other angles once the longest text of a batch
    is beyond the original length. Up to there nobody's numbers depend on anybody else's. Raises
    ValueError.
    """
    value = getattr(config, "max_position_embeddings", None)
    most = 4096 if value is None else size(config, "max_position_embeddings", model_dir)
    reason = ""
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        original = int(_rope_number(rope, "original_max_position_embeddings", most, model_dir))
        switches = kind == "longrope" or (kind != "default" and bool(MSCALES & rope.keys()))
        if switches:
            most = min(most, max(original, 1))
        elif kind == "yarn":
            most = max(most, int(original * _rope_number(rope, "factor", 1.0, model_dir)))
        if switches or "dynamic" in kind:
            reason = f"; beyond them {kind} rope scaling would make requests change one another"
    return most, reason


def _rope_number(rope: dict[str, Any], name: str, default: float, model_dir: Path | str) -> float:
    value = rope.get(name)
    if value is None:
        return default
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"{model_dir}/config.json: {name} {repr(value)[:80]} of the rope parameters is no "
            "number above 0: correct it"
        )
    return float(value)


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
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path.parent, local_files_only=True, trust_remote_code=False
    )
    return config
