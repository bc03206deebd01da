"""Runs layers of an exchange, one process per rank over a domain of their own, and times them."""

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from revivemoe.comm.dispatch import region_bytes
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.shm import HandedFd, create_segment
from revivemoe.comm.transport import Transport
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.commands import DomainSpec

WARM_UP = 20


@dataclass(frozen=True)
class Shape:
    ranks: int
    tokens: int
    """Per rank that sends."""
    hidden: int
    top_k: int
    layers: dict[str, int]
    """How many, by backend."""
    store_address: str
    first_epoch: int = 0
    """Of the domains: a store keeps what an epoch has left."""


Build = Callable[[Transport, Shape], Callable[[], None]]
"""Makes what is timed, in the rank's process; it goes there by its name."""


def in_ranks(shape: Shape, build: Build) -> list[list[list[float]]]:
    """Per backend, per rank: seconds of each layer, and after them its seconds of waiting."""
    sizes = (shape.tokens, shape.hidden, 4, shape.top_k)
    fd = create_segment(shape.ranks, region_bytes(shape.ranks, *sizes))
    try:
        return _measure(shape, fd, build)
    finally:
        os.close(fd)


def _measure(shape: Shape, fd: int, build: Build) -> list[list[list[float]]]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    pipes, processes = [], []
    for rank in range(shape.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank_main, args=(rank, theirs, HandedFd(fd), shape, build)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [[pipe.recv() for pipe in pipes] for _ in shape.layers]
        for pipe in pipes:
            pipe.send(None)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank_main(me: int, conn: Connection, handed: HandedFd, shape: Shape, build: Build) -> None:
    torch.set_num_threads(1)
    members = tuple(RankId(r) for r in range(shape.ranks))
    with Domains(FenceFlag(), handed.fd) as domains, torch.inference_mode():
        for epoch, (backend, num) in enumerate(shape.layers.items(), shape.first_epoch):
            spec = DomainSpec(backend=backend, store_address=shape.store_address)
            (transport,) = domains.enter(spec, Epoch(epoch), members, RankId(me))
            conn.send(_timed(transport, num, build(transport, shape)))
        conn.recv()  # all have done


def _timed(transport: Transport, num: int, layer: Callable[[], None]) -> list[float]:
    seconds: list[float] = []
    waited_before = 0.0
    for turn in range(num + WARM_UP):
        if turn == WARM_UP:
            waited_before = transport.waited_s
        began = time.perf_counter()
        layer()
        seconds.append(time.perf_counter() - began)
    return [*seconds[WARM_UP:], transport.waited_s - waited_before]


def figures(per_rank: list[list[float]]) -> dict[str, float]:
    """Milliseconds per layer, over all ranks and layers."""
    waits = sum(seconds[-1] for seconds in per_rank)
    layers = sorted(s * 1e3 for seconds in per_rank for s in seconds[:-1])
    return {
        "median_ms": layers[len(layers) // 2],
        "p99_ms": layers[int(len(layers) * 0.99)],
        "worst_ms": layers[-1],
        "waiting_share": waits * 1e3 / sum(layers),
    }
