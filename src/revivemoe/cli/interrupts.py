"""Ctrl-C and SIGTERM in commands that have something to clean up."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from revivemoe.cli.at_once import end_at_once


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Either raises KeyboardInterrupt in here, once: a second must not break the cleaning up.

    Import what is needed before: libraries do not expect exceptions while they are loaded.
    """
    _handle(_interrupt_once)
    try:
        yield
    finally:
        end_at_once()


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    _handle(signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle(handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
