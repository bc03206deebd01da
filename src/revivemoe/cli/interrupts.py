"""Ctrl-C in commands that have something to clean up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, once: a second must not break the cleaning up.

    Import what is needed before: libraries do not expect exceptions while they are loaded.
    """
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
