"""How long one MoE layer's dispatch and combine take, by transport: no experts, no attention."""

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore

from revivemoe.comm.dispatch import Dispatcher, region_bytes
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.shm import HandedFd, create_segment
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.commands import DomainSpec

_SLOTS = 8
WARM_UP = 20
FAN_OUT_TOKENS = (16, 256)
"""Of a decode step, and of a prefill chunk."""


def _layers(domains: Domains, num: int, tokens: int, hidden: int, top_k: int) -> list[float]:
    """Seconds of each of `num` layers on this rank, and after them its seconds of waiting."""
    (transport,) = domains.current
    dispatcher = Dispatcher(transport, _SLOTS)
    generator = torch.Generator().manual_seed(transport.index)
    hidden_TH = torch.randn(tokens, hidden, generator=generator)
    scores = torch.rand(tokens, transport.size * _SLOTS, generator=generator)
    weights_TK, slot_ids_TK = scores.topk(top_k)
    seconds = []
    for turn in range(num + WARM_UP):
        if turn == WARM_UP:
            waited_before = transport.waited_s
        started = time.perf_counter()
        got = dispatcher.dispatch(hidden_TH, slot_ids_TK, weights_TK)
        dispatcher.combine(got.rows_RH, got.handle)
        seconds.append(time.perf_counter() - started)
    return [*seconds[WARM_UP:], transport.waited_s - waited_before]


def _rank_main(me: int, conn: Connection, handed: HandedFd, shape: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    members = tuple(RankId(r) for r in range(shape["ranks"]))
    sizes = (shape["tokens"], shape["hidden"], shape["top_k"])
    with Domains(FenceFlag(), handed.fd) as domains, torch.inference_mode():
        for epoch, (backend, num) in enumerate(shape["layers"].items()):
            spec = DomainSpec(backend=backend, store_address=shape["store_address"])
            domains.enter(spec, Epoch(epoch), members, RankId(me))
            conn.send(_layers(domains, num, *sizes))
        conn.recv()  # all have done


def in_ranks(
    shape: dict[str, Any], main: Callable[[int, Connection, HandedFd, dict[str, Any]], None]
) -> list[list[list[float]]]:
    """Per backend, per rank: what `main` has sent from its process."""
    sizes = (shape["tokens"], shape["hidden"], 4, shape["top_k"])
    fd = create_segment(shape["ranks"], region_bytes(shape["ranks"], *sizes))
    try:
        return _measure(shape, fd, main)
    finally:
        os.close(fd)


def _measure(
    shape: dict[str, Any],
    fd: int,
    main: Callable[[int, Connection, HandedFd, dict[str, Any]], None],
) -> list[list[list[float]]]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "revivemoe.bench.dispatch"])
    pipes, processes = [], []
    for rank in range(shape["ranks"]):
        ours, theirs = context.Pipe()
        process = context.Process(target=main, args=(rank, theirs, HandedFd(fd), shape))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [[pipe.recv() for pipe in pipes] for _ in shape["layers"]]
        for pipe in pipes:
            pipe.send(None)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()


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


def run(
    ranks: int = 4,
    tokens: int = 16,
    hidden: int = 512,
    top_k: int = 4,
    layers: int = 2000,
    gloo_layers: int = 300,
) -> dict[str, Any]:
    """Dispatch and combine of `tokens` rows per rank, float32, one thread per rank.

    Prints a table and returns `{"shape": {...}, "shm": {...}, "gloo": {...}}`, times in
    milliseconds per layer: one dispatch and one combine, waits for the other ranks included.
    """
    from revivemoe.bench import fan_out  # it uses this module

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shape = {
        "ranks": ranks,
        "tokens": tokens,
        "hidden": hidden,
        "top_k": top_k,
        "layers": {"shm": layers, "gloo": gloo_layers},
        "store_address": f"127.0.0.1:{store.port}",
    }
    measured = in_ranks(shape, _rank_main)
    results = zip(("shm", "gloo"), map(figures, measured), strict=True)
    fans = {
        count: fan_out.measure(hidden, top_k, count, layers, str(shape["store_address"]))
        for count in FAN_OUT_TOKENS
    }
    del shape["store_address"]
    report = {"shape": {**shape, "cores": len(os.sched_getaffinity(0))}, **dict(results)}
    report["fan_out"] = {str(count): rows for count, rows in fans.items()}
    _print(report)
    _print_fan_out(fans)
    return report


def _print_fan_out(fans: dict[int, list[Any]]) -> None:
    table = Table(title="1 attention rank and 5 expert ranks: ms per layer on the attention rank")
    for column in ("transport", "tokens", "way", "median", "p99", "worst"):
        table.add_column(column, justify="left" if column in ("transport", "way") else "right")
    for tokens, rows in fans.items():
        for backend, way, found in rows:
            times = [f"{found[key]:.3f}" for key in ("median_ms", "p99_ms", "worst_ms")]
            table.add_row(backend, str(tokens), way, *times)
    Console().print(table)


def _print(report: dict[str, Any]) -> None:
    shape = report["shape"]
    table = Table(
        title="dispatch + combine, ms per layer: {ranks} ranks on {cores} cores, {tokens} tokens "
        "each, hidden {hidden}, top {top_k}, float32".format(**shape)
    )
    for column in ("transport", "median", "p99", "worst", "waiting"):
        table.add_column(column, justify="right" if column != "transport" else "left")
    for name in ("shm", "gloo"):
        figures = report[name]
        times = [f"{figures[key]:.3f}" for key in ("median_ms", "p99_ms", "worst_ms")]
        table.add_row(name, *times, f"{figures['waiting_share']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    run()
