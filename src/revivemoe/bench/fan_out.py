"""Does a trampoline pay? One attention rank and five expert ranks, directly or over one hop.

The paper's platform lets an attention rank send each token once, to one expert rank, which passes
it on to the others. Directly, a token goes to each of up to K expert ranks itself.
"""

from collections.abc import Callable
from itertools import count

import torch

from revivemoe.bench.in_ranks import Shape, figures, in_ranks
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.transport import Transport

EXPERT_RANKS = 5
SLOTS = 8
_EPOCHS = count(1000)
SOURCE, SERVERS = (0,), tuple(range(1, EXPERT_RANKS + 1))
Row = tuple[str, str, dict[str, float]]
"""Transport, way, milliseconds per layer on the attention rank."""


def measure(hidden: int, top_k: int, tokens: int, layers: int, store_address: str) -> list[Row]:
    """Each way over each transport."""
    rows: list[Row] = []
    for backend, share in (("shm", 1), ("gloo", 5)):
        for way, build in (("direct", _direct), ("trampoline", _hop)):
            counts = {backend: layers // share}
            ranks, epoch = 1 + EXPERT_RANKS, next(_EPOCHS)
            shape = Shape(ranks, tokens, hidden, top_k, counts, store_address, epoch)
            (per_rank,) = in_ranks(shape, build)
            rows.append((backend, way, figures(per_rank[:1])))
    return rows


def _direct(transport: Transport, shape: Shape) -> Callable[[], None]:
    """As it is done: every token to each rank that holds one of its experts."""
    tokens = shape.tokens if transport.index in SOURCE else 0
    hidden = torch.randn(tokens, shape.hidden)
    weights, chosen = torch.rand(tokens, EXPERT_RANKS * SLOTS).topk(shape.top_k)
    slots = chosen + SLOTS  # rank 0 holds no experts
    dispatcher = Dispatcher(transport, SLOTS, SOURCE, SERVERS)

    def layer() -> None:
        got = dispatcher.dispatch(hidden, slots, weights)
        dispatcher.combine(got.rows_RH, got.handle)

    return layer


def _hop(transport: Transport, shape: Shape) -> Callable[[], None]:
    """Every token to one expert rank, with its choices; from there to those that hold them."""
    tokens, top_k = shape.tokens if transport.index in SOURCE else 0, shape.top_k
    hidden = torch.randn(tokens, shape.hidden + 2 * top_k)
    first = (torch.arange(tokens)[:, None] % EXPERT_RANKS + 1) * SLOTS
    ones = torch.ones(tokens, 1)
    to_one = Dispatcher(transport, SLOTS, SOURCE, SERVERS)
    to_all = Dispatcher(transport, SLOTS, SERVERS, SERVERS)

    def layer() -> None:
        arrived = to_one.dispatch(hidden, first, ones)
        rows = arrived.rows_RH
        weights, chosen = torch.rand(len(rows), EXPERT_RANKS * SLOTS).topk(top_k)
        passed_on = to_all.dispatch(rows, chosen + SLOTS, weights)
        back = to_all.combine(passed_on.rows_RH, passed_on.handle)
        to_one.combine(back, arrived.handle)

    return layer
