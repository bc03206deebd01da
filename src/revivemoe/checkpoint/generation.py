"""What `generation_config.json` says: which tokens end a text, and the defaults of requests."""

import json
import logging
import math
from pathlib import Path

from revivemoe.sampling_params import SamplingDefaults

log = logging.getLogger(__name__)

FILE = "generation_config.json"
AUTO, NONE = "auto", "vllm"
Fields = dict[str, object]
_RANGES = {
    "temperature": (0.0, 1e30),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def sampling_defaults(source: str, model_dir: Path) -> SamplingDefaults:
    """`source`: auto (the checkpoint's file, if there is one), vllm (none), or a folder with one.

    The `max_new_tokens` of a folder is a limit, too, as in vLLM: an operator has named it.
    Raises ValueError, one line, for a file that is not there or says what cannot be.
    """
    if source == NONE:
        return SamplingDefaults()
    path, fields = _fields(source, model_dir)
    found: dict[str, float] = {}
    for name, (least, most) in _RANGES.items():
        if (value := fields.get(name)) is not None:
            found[name] = _number(value, least, most, name, path)
    top_k, max_tokens = fields.get("top_k"), fields.get("max_new_tokens")
    if max_tokens is not None:
        max_tokens = int(_number(max_tokens, 1, math.inf, "max_new_tokens", path))
    return SamplingDefaults(
        **found,
        top_k=0 if top_k is None else int(_number(top_k, -1, math.inf, "top_k", path)),
        max_tokens=max_tokens,
        max_tokens_limit=None if source == AUTO else max_tokens,
    )


def end_token_ids(source: str, model_dir: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text: the file's, or else those of `config` (the checkpoint's).

    `source` as above, but vllm means the checkpoint's file here, as in vLLM: which tokens end a
    text is no matter of taste. Ids outside the vocabulary cannot be drawn, and are dropped.
    Raises ValueError, one line.
    """
    path, fields = _fields(AUTO if source == NONE else source, model_dir)
    given = fields.get("eos_token_id")
    if given is None:
        given, path = config.get("eos_token_id"), model_dir / "config.json"
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int for i in ids):
        raise ValueError(
            f"{path}: eos_token_id must be a token id or a list of them, not {repr(given)[:80]}: "
            "correct it"
        )
    kept = [i for i in dict.fromkeys(ids) if 0 <= i < vocab_size]
    if dropped := sorted(set(ids) - set(kept)):
        why = "%s: eos_token_id %s is outside the vocabulary (0 to %d): ignored; %s end a text"
        log.warning(why, path, dropped[:8], vocab_size - 1, kept or "no tokens")
    return tuple(kept)


def _fields(source: str, model_dir: Path) -> tuple[Path, Fields]:
    """The file and what it says: nothing if `source` is auto and there is none."""
    path = (model_dir if source == AUTO else Path(source)) / FILE
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if source == AUTO:
            return path, {}
        raise ValueError(
            f"--generation-config {source}: no {path}: give auto, vllm or a folder with one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object")
    return path, fields


def _number(value: object, least: float, most: float, name: str, path: Path) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not (least <= value <= most) or value == math.inf:  # type: ignore[operator]
        raise ValueError(
            f"{path}: {name} {repr(value)[:80]} is out of range ({least:g} to {most:g}): correct "
            "it, or start with --generation-config vllm"
        )
    assert isinstance(value, int | float)
    return value
