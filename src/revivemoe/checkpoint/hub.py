"""A checkpoint by name: a local directory, or a model of the Hugging Face hub or of its cache."""

import re
from pathlib import Path

from revivemoe.checkpoint.config import read_config

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Configuration and tokenizer: enough to refuse a model before its weights are fetched."""
WEIGHTS = ("*.safetensors",)
NOT_OURS = ("*/*", "consolidated*")
"""Folders (other formats of the same weights), and weights in their authors' own layout."""


def is_hub_id(model: str) -> bool:
    """Whether it may name a model of the hub; what is a directory here is that directory."""
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def local_directory(model: str, revision: str | None = None) -> Path:
    """Where the checkpoint lies, after it was fetched if it has to be: progress goes to standard
    error. The hub's own variables count: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...

    Raises ValueError, one line, for what is neither a directory nor to be had, and OSError.
    """
    if not is_hub_id(model):
        if revision is not None:
            raise ValueError(
                f"--revision {revision}: {model} is a local directory, which has no revisions"
                if Path(model).is_dir()
                else f"--revision {revision}: {model} is no id of the hub (ORG/NAME)"
            )
        return Path(model)
    read_config(_fetched(model, revision, SMALL))  # refused before its weights are fetched
    return _fetched(model, revision, (*SMALL, *WEIGHTS))


def _fetched(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    transport = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NOT_OURS)
        )
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"{_named(model, revision)} {_why_absent(error)}") from None
    except (transport, errors.HFValidationError, errors.XetDownloadError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{_named(model, revision)} cannot be had: {type(error).__name__}: {said}"
        ) from None
    return Path(path)


def _named(model: str, revision: str | None) -> str:
    at = f" at revision {revision}" if revision else ""
    return f"{model}{at} is no directory here, and as a model of the hub it"


def _why_absent(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"is not, or not whole, in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is "
            "set: unset it, or give a directory"
        )
    cause = error.__cause__ or error
    said = " ".join(str(cause).split())[:200]
    return (
        f"is not, or not whole, in the cache ({constants.HF_HUB_CACHE}), and the hub "
        f"({constants.ENDPOINT}) cannot be reached: {type(cause).__name__}: {said}"
    )
