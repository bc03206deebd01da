"""Make a random-weight checkpoint that loads like a published one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from revivemoe.checkpoint import presets
from revivemoe.checkpoint.tokenizer import save_tokenizer
from revivemoe.checkpoint.weights import fill_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16")


def make_model(
    directory: str | Path,
    arch: str,
    preset: str,
    seed: int,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write config, sharded safetensors, tokenizer, chat template and generation config.

    Equal arguments give equal files. `progress` is told what begins, one line at a time.

    Raises ValueError for an unknown name or a directory that is not empty.
    """
    _check("architecture", arch, presets.ARCHS)
    _check("preset", preset, presets.PRESETS)
    _check("dtype", dtype, DTYPES)
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory: choose another or empty it")
    size = presets.SIZES[preset]
    progress(f"training a tokenizer of {size.vocab} tokens")
    path.mkdir(parents=True, exist_ok=True)
    save_tokenizer(path, size.vocab)
    progress("drawing the weights")
    model = _random_model(arch, size, seed, dtype)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    progress(f"writing {millions:.1f} M parameters to {path}")
    with _no_progress_bar():
        model.save_pretrained(path, max_shard_size=size.shard_bytes)
    _publish(path, presets.config_fields(arch, size))


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _publish(path: Path, fields: dict[str, object]) -> None:
    """Published field names beside those of this release, and files that others may read."""
    config = path / "config.json"
    merged = json.loads(config.read_text()) | fields
    config.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
    for shard in path.glob("*.safetensors"):
        shard.chmod(config.stat().st_mode)


def _random_model(arch: str, size: presets.Preset, seed: int, dtype: str) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(arch, **presets.config_fields(arch, size))
    with no_init_weights():  # every tensor is overwritten below
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # published in float32 whatever the rest is
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    fill_weights(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=presets.BOS_ID, eos_token_id=list(presets.END_IDS), pad_token_id=presets.PAD_ID
    )
    return model
