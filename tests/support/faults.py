"""Kills beside a load, and whether anybody noticed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from support.cases import Case
from support.client import Answer, Load, differences
from support.deployment import Deployment, kill

Beside = Callable[[Load], Awaitable[None]]


def killer(server: Deployment, *moments: tuple[int, int]) -> Beside:
    """Kills each (rank, once so many tokens have come), each after the one before is overcome."""
    pids = server.pids()
    num_dead = server.num_dead()

    async def beside(load: Load) -> None:
        for count, (rank, num_tokens) in enumerate(moments, num_dead + 1):
            await load.reached(num_tokens)
            kill(pids[rank])
            await asyncio.to_thread(server.await_recovery, count)

    return beside


def killer_at(server: Deployment, *points: tuple[int, int, str, int]) -> Beside:
    """As `killer`, at points of a step: (rank, tokens, phase, layer)."""
    num_dead = server.num_dead()

    async def beside(load: Load) -> None:
        for count, (rank, num_tokens, phase, layer) in enumerate(points, num_dead + 1):
            await load.reached(num_tokens)
            await asyncio.to_thread(server.inject_kill, rank, phase=phase, layer=layer)
            await asyncio.to_thread(server.await_recovery, count)

    return beside


def unlike(expected: Sequence[Answer], got: Sequence[Answer], cases: Sequence[Case]) -> list[str]:
    """Every difference, by the name of the case."""
    pairs = zip(cases, expected, got, strict=True)
    return [f"{case.name}: {d}" for case, a, b in pairs for d in differences(a, b)]
