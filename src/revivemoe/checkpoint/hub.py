"""A checkpoint by name: a local directory, or a model of the Hugging Face hub or of its cache."""

import json
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

from revivemoe.checkpoint.files import missing_files
from revivemoe.checkpoint.inspect import inspect_config

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Configuration and tokenizer: enough to refuse a model before its weights are fetched."""
WEIGHTS = ("*.safetensors",)
NOT_OURS = ("*/*", "consolidated*")
"""Folders (other formats of the same weights), and weights in their authors' own layout."""
STALE_S = 86400.0
"""Since when nothing was written to what an interrupted fetch has left: nobody fetches it."""


def is_hub_id(model: str) -> bool:
    """Whether it may name a model of the hub; what is a directory here is that directory."""
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def local_directory(
    model: str,
    revision: str | None = None,
    check: Callable[[Path], object] = inspect_config,
) -> Path:
    """Where the checkpoint lies, after it was fetched if it has to be: progress goes to standard
    error. The hub's own variables count: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...

    `check` is shown all but the weights before these are fetched, and raises ValueError if they are
    not worth it. Raises ValueError, one line, for what is neither a directory nor to be had, and
    OSError. A signal may end the process meanwhile: files that are whole are not fetched again.
    """
    if revision is not None and not revision.strip():
        raise ValueError("--revision is empty: give a branch, a tag or a commit, or leave it out")
    if not is_hub_id(model):
        if revision is not None:
            raise ValueError(
                f"--revision {revision}: {model} is a local directory, which has no revisions"
                if Path(model).is_dir()
                else f"--revision {revision}: {model} is no id of the hub (ORG/NAME)"
            )
        return Path(model)
    small = _fetched(model, revision, SMALL)
    check(small)
    _remove_stale(small.parents[1] / "blobs", time.time() - STALE_S)
    path = _fetched(model, revision, (*SMALL, *WEIGHTS))
    _refuse_partial(path, model, revision)
    return path


def _remove_stale(blobs: Path, before: float) -> None:
    """Parts of files that an interrupted fetch has left behind: the hub's client goes on with none,
    and removes none.
    """
    for part in blobs.glob("*.incomplete"):
        try:
            if part.stat().st_mtime < before:
                part.unlink()
        except OSError:  # another fetch was faster, or it is not ours to remove
            continue


def _refuse_partial(path: Path, model: str, revision: str | None) -> None:
    """Raises ValueError for files that are published, or may be, and are not here: where the hub's
    client cannot read its list of them, it takes whatever is here for all."""
    published = _published(path.parents[1] / "trees" / f"{path.name}.json")
    missing = [name for name in missing_files(path) if published is None or name in published]
    if missing:
        raise ValueError(
            f"{_named(model, revision)} is not whole in the cache ({path} lacks {missing[0]}): "
            "start once with the hub in reach, or give a directory"
        )


def _published(tree: Path) -> Collection[str] | None:
    """Names of all files, as the hub's client has kept them; None: nobody knows."""
    try:
        files = json.loads(tree.read_text())["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return files if isinstance(files, dict) else None


def _fetched(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    transport = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NOT_OURS)
        )
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"{_named(model, revision)} {_why_absent(error)}") from None
    except (IsADirectoryError, NotADirectoryError):  # the beginning, or more, of other revisions
        raise ValueError(f"{_named(model, revision)} {_why_absent(None)}") from None
    except Exception as error:  # its libraries' own kinds, which have no common one
        if isinstance(error, OSError) and not isinstance(error, transport):
            raise
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{_named(model, revision)} cannot be had: {type(error).__name__}: {said}"
        ) from None
    return Path(path)


def _named(model: str, revision: str | None) -> str:
    at = f" at revision {revision}" if revision else ""
    return f"{model}{at} is no directory here, and as a model of the hub it"


def _why_absent(error: Exception | None) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"is not, or not whole, in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is "
            "set: unset it, or give a directory"
        )
    absent = (
        f"is not, or not whole, in the cache ({constants.HF_HUB_CACHE}), and the hub "
        f"({constants.ENDPOINT}) cannot be reached"
    )
    if error is None:
        return absent
    cause = error.__cause__ or error
    return f"{absent}: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
