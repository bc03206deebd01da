"""Does a trampoline pay? One attention rank and five expert ranks, directly or over one hop.

The paper's platform lets an attention rank send each token once, to one expert rank, which passes
it on to the others. Directly, a token goes to each of up to K expert ranks itself.
"""

import time
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from revivemoe.bench.dispatch import WARM_UP, figures, in_ranks
from revivemoe.comm.dispatch import Dispatcher
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import FenceFlag
from revivemoe.comm.shm import HandedFd
from revivemoe.comm.transport import Transport
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.commands import DomainSpec

EXPERT_RANKS = 5
SLOTS = 8
_EPOCHS = count(1000)
"""One for each measurement: a store keeps what an epoch has left."""
SOURCE, SERVERS = (0,), tuple(range(1, EXPERT_RANKS + 1))


def measure(hidden: int, top_k: int, tokens: int, layers: int, store_address: str) -> list[Any]:
    """Rows of the table: transport, way, milliseconds per layer on the attention rank."""
    rows = []
    for backend, share in (("shm", 1), ("gloo", 5)):
        for way in ("direct", "trampoline"):
            shape = {
                "ranks": 1 + EXPERT_RANKS,
                "tokens": tokens,
                "hidden": hidden,
                "top_k": top_k,
                "layers": {backend: layers // share},
                "way": way,
                "epoch": next(_EPOCHS),
                "store_address": store_address,
            }
            (per_rank,) = in_ranks(shape, rank_main)
            rows.append((backend, way, figures(per_rank[:1])))
    return rows


def rank_main(me: int, conn: Connection, handed: HandedFd, shape: dict[str, Any]) -> None:
    """One rank: runs the layers, and sends its seconds."""
    torch.set_num_threads(1)
    members = tuple(RankId(r) for r in range(shape["ranks"]))
    ((backend, num),) = shape["layers"].items()
    with Domains(FenceFlag(), handed.fd) as domains, torch.inference_mode():
        spec = DomainSpec(backend=backend, store_address=shape["store_address"])
        (transport,) = domains.enter(spec, Epoch(shape["epoch"]), members, RankId(me))
        conn.send(_layers(transport, shape, num))
        conn.recv()  # all have done


def _layers(transport: Transport, shape: dict[str, Any], num: int) -> list[float]:

    layer = _Direct(transport, shape) if shape["way"] == "direct" else _Hop(transport, shape)
    seconds: list[float] = []
    waited_before = 0.0
    for turn in range(num + WARM_UP):
        if turn == WARM_UP:
            waited_before = transport.waited_s
        began = time.perf_counter()
        layer.run()
        seconds.append(time.perf_counter() - began)
    return [*seconds[WARM_UP:], transport.waited_s - waited_before]


class _Direct:
    """As it is done: every token to each rank that holds one of its experts."""

    def __init__(self, transport: Transport, shape: dict[str, Any]) -> None:
        tokens = shape["tokens"] if transport.index in SOURCE else 0
        self._hidden = torch.randn(tokens, shape["hidden"])
        scores = torch.rand(tokens, EXPERT_RANKS * SLOTS)
        weights, chosen = scores.topk(shape["top_k"])
        self._weights, self._slots = weights, chosen + SLOTS  # rank 0 holds no experts
        self._dispatcher = Dispatcher(transport, SLOTS, SOURCE, SERVERS)

    def run(self) -> None:
        got = self._dispatcher.dispatch(self._hidden, self._slots, self._weights)
        self._dispatcher.combine(got.rows_RH, got.handle)


class _Hop:
    """Every token to one expert rank, with its choices; from there to those that hold them."""

    def __init__(self, transport: Transport, shape: dict[str, Any]) -> None:
        tokens = shape["tokens"] if transport.index in SOURCE else 0
        self._top_k = shape["top_k"]
        self._hidden = torch.randn(tokens, shape["hidden"] + 2 * self._top_k)
        self._first = (torch.arange(tokens)[:, None] % EXPERT_RANKS + 1) * SLOTS
        self._ones = torch.ones(tokens, 1)
        self._to_one = Dispatcher(transport, SLOTS, SOURCE, SERVERS)
        self._to_all = Dispatcher(transport, SLOTS, SERVERS, SERVERS)

    def run(self) -> None:
        arrived = self._to_one.dispatch(self._hidden, self._first, self._ones)
        rows = arrived.rows_RH
        weights, chosen = torch.rand(len(rows), EXPERT_RANKS * SLOTS).topk(self._top_k)
        passed_on = self._to_all.dispatch(rows, chosen + SLOTS, weights)
        back = self._to_all.combine(passed_on.rows_RH, passed_on.handle)
        self._to_one.combine(back, arrived.handle)
