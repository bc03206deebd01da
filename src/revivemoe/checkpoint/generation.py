"""What `generation_config.json` says of sampling: the defaults of requests that say nothing."""

import json
import math
from pathlib import Path

from revivemoe.sampling_params import SamplingDefaults

FILE = "generation_config.json"
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def sampling_defaults(source: str, model_dir: Path) -> SamplingDefaults:
    """`source`: auto (the checkpoint's file, if there is one), vllm (none), or a folder with one.

    Raises ValueError, one line, for a file that is not there or says what cannot be.
    """
    if source == "vllm":
        return SamplingDefaults()
    folder = model_dir if source == "auto" else Path(source)
    path = folder / FILE
    if source != "auto" and not path.is_file():
        raise ValueError(
            f"--generation-config {source}: no {path}: give auto, vllm or a folder with one"
        )
    if not path.exists():
        return SamplingDefaults()
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return _read(document, path)


def _read(document: dict[str, object], path: Path) -> SamplingDefaults:
    found: dict[str, float] = {}
    for name, (least, most) in _RANGES.items():
        if (value := document.get(name)) is not None:
            found[name] = _number(value, least, most, name, path)
    top_k, max_tokens = document.get("top_k"), document.get("max_new_tokens")
    return SamplingDefaults(
        **found,
        top_k=0 if top_k is None else int(_number(top_k, -1, math.inf, "top_k", path)),
        max_tokens=None
        if max_tokens is None
        else int(_number(max_tokens, 1, math.inf, "max_new_tokens", path)),
    )


def _number(value: object, least: float, most: float, name: str, path: Path) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not (least <= value <= most) or value == math.inf:  # type: ignore[operator]
        raise ValueError(
            f"{path}: {name} {value!r} is out of range ({least:g} to {most:g}): correct it, or "
            "start with --generation-config vllm"
        )
    assert isinstance(value, int | float)
    return value
