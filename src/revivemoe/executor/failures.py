"""Loads that fail while nothing is wrong with the rank: no memory, no such file, bad contents."""

from safetensors import SafetensorError

from revivemoe.model.load import CheckpointError

REFUSALS = (OSError, ValueError, KeyError, MemoryError, SafetensorError)
"""What reading a checkpoint, or asking a peer, may end with."""
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""How torch says so in a plain RuntimeError; its OutOfMemoryError is one, too."""


def load_failure(error: BaseException) -> str | None:
    """In one line, why a load has failed; None if it was the rank's own code."""
    if isinstance(error, REFUSALS) or _no_memory(error):
        return in_one_line(error)
    return None


def in_one_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, CheckpointError | OSError) and line:
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def _no_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
