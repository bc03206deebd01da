"""Long work beside the loop that serves everybody's streams."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="aside")
"""A few: what waits can still be cancelled, what runs cannot."""


async def aside(work: Callable[[], T], size: float, inline: float) -> T:
    """What `work` gives; in a thread, if its `size` is above what is done `inline`."""
    if size <= inline:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
