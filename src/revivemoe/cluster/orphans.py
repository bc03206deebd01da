"""Processes that a container's first process (PID 1) inherits: it has to take note of their end."""

import asyncio
import os

import psutil

LOOK_EVERY_S = 2.0


class Orphans:
    """Reaps those that nobody here waits for: whose end is still untold at the next look."""

    def __init__(self) -> None:
        self._ended: set[int] = set()

    def look(self) -> None:
        """Call now and then."""
        ended = {child.pid for child in psutil.Process().children() if _is_zombie(child)}
        for pid in ended & self._ended:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # its parent has by now
                continue
        self._ended = ended

    async def keep_looking(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()


def _is_zombie(child: psutil.Process) -> bool:
    try:
        return bool(child.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
