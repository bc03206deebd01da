"""Ctrl-C and SIGTERM where nothing is to be cleaned up. It comes first, and imports little."""

import os
import signal


def end_at_once() -> None:
    """From now on either ends the process, as it would without any handler.

    Of a container's first process (PID 1) the kernel ignores signals that have no handler.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit if os.getpid() == 1 else signal.SIG_DFL)


def _exit(number: int, frame: object) -> None:
    os._exit(128 + number)
