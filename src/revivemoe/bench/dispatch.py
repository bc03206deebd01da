"""How long one MoE layer's dispatch and combine take, by transport: no experts, no attention."""

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore

from revivemoe.bench import fan_out
from revivemoe.bench.in_ranks import Shape, figures, in_ranks
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.transport import Transport

_SLOTS = 8
FAN_OUT_TOKENS = (16, 256)
"""Of a decode step, and of a prefill chunk."""
TIMES = ("median_ms", "p99_ms", "worst_ms")


def _layer(transport: Transport, shape: Shape) -> Callable[[], None]:
    dispatcher = Dispatcher(transport, _SLOTS)
    generator = torch.Generator().manual_seed(transport.index)
    hidden_TH = torch.randn(shape.tokens, shape.hidden, generator=generator)
    scores = torch.rand(shape.tokens, transport.size * _SLOTS, generator=generator)
    weights_TK, slot_ids_TK = scores.topk(shape.top_k)

    def layer() -> None:
        got = dispatcher.dispatch(hidden_TH, slot_ids_TK, weights_TK)
        dispatcher.combine(got.rows_RH, got.handle)

    return layer


def run(
    ranks: int = 4,
    tokens: int = 16,
    hidden: int = 512,
    top_k: int = 4,
    layers: int = 2000,
    gloo_layers: int = 300,
) -> dict[str, object]:
    """Dispatch and combine of `tokens` rows per rank, float32, one thread per rank.

    Prints a table and returns `{"shape": {...}, "shm": {...}, "gloo": {...}}`, times in
    milliseconds per layer: one dispatch and one combine, waits for the other ranks included.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}"
    counts = {"shm": layers, "gloo": gloo_layers}
    shape = Shape(ranks, tokens, hidden, top_k, counts, address)
    found = dict(zip(counts, map(figures, in_ranks(shape, _layer)), strict=True))
    fans = {
        count: fan_out.measure(hidden, top_k, count, layers, address) for count in FAN_OUT_TOKENS
    }
    told = {name: vars(shape)[name] for name in ("ranks", "tokens", "hidden", "top_k", "layers")}
    told["cores"] = len(os.sched_getaffinity(0))
    _print(told, found)
    _print_fan_out(fans)
    return {"shape": told, **found, "fan_out": {str(count): rows for count, rows in fans.items()}}


def _print_fan_out(fans: Mapping[int, Sequence[fan_out.Row]]) -> None:
    table = Table(title="1 attention rank and 5 expert ranks: ms per layer on the attention rank")
    for column in ("transport", "tokens", "way", "median", "p99", "worst"):
        table.add_column(column, justify="left" if column in ("transport", "way") else "right")
    for tokens, rows in fans.items():
        for backend, way, found in rows:
            table.add_row(backend, str(tokens), way, *(f"{found[key]:.3f}" for key in TIMES))
    Console().print(table)


def _print(shape: Mapping[str, object], found: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(
        title="dispatch + combine, ms per layer: {ranks} ranks on {cores} cores, {tokens} tokens "
        "each, hidden {hidden}, top {top_k}, float32".format(**shape)
    )
    for column in ("transport", "median", "p99", "worst", "waiting"):
        table.add_column(column, justify="right" if column != "transport" else "left")
    for name, times in found.items():
        cells = [f"{times[key]:.3f}" for key in TIMES]
        table.add_row(name, *cells, f"{times['waiting_share']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    run()
