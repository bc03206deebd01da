"""How a process ended, and whether what it ran may have brought that about."""

import signal
from typing import NamedTuple

CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)
"""Signals that a process brings upon itself."""


class Ending(NamedTuple):
    how: str
    by_itself: bool
    """Its requests may be to blame. Suspected wrongly, one is soon cleared."""


def ending(status: int | None, killed_by_us: bool, oom_struck: bool) -> Ending:
    """`status`: as `os.waitstatus_to_exitcode`, None if nobody told. `oom_struck`: lately."""
    if status is None:
        if killed_by_us:
            return Ending("killed by the engine", False)
        return Ending("how it ended is not known", True)
    how = describe_status(status)
    if status == -signal.SIGKILL:
        if oom_struck and not killed_by_us:
            return Ending(f"{how}: the kernel's out-of-memory killer", True)
        return Ending(how, False)
    return Ending(how, status > 0 or -status in CRASHES)


def describe_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"killed by signal {-status}"
