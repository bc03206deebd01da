"""Real rank processes around `Domains`, driven over pipes: the harness of test_transports.

Each worker has a control thread that reads the pipe: a fence takes effect at once, as in a rank,
whatever the main thread waits for; everything else is done by the main thread in order.
"""

import contextlib
import multiprocessing as mp
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from revivemoe.comm.dispatch import Dispatcher, region_bytes
from revivemoe.comm.domain import Domains
from revivemoe.comm.fence import CommunicationFailed, DomainLeft, FenceFlag
from revivemoe.comm.shm import HandedFd, create_segment
from revivemoe.comm.transport import Transport
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.commands import DomainSpec

MAX_TOKENS, HIDDEN, TOP_K, SLOTS = 64, 96, 4, 3
REPLY_S = 20.0


# ---- what a worker can be asked for ---------------------------------------------------------


def payload(seed: int, source: int, size: int, row_bytes: int) -> list[np.ndarray]:
    """What member `source` sends to each member: random rows, often none."""
    rng = np.random.default_rng((seed, source))
    rows = rng.integers(0, 24, size) * (rng.random(size) < 0.7)
    return [rng.integers(0, 256, (n, row_bytes), dtype=np.uint8) for n in rows]


def row_bytes_of(seed: int) -> int:
    return (1, 16, 48, 400)[seed % 4]


def received(transport: Transport) -> list[torch.Tensor]:
    """Send the outbox; what all members sent here."""
    transport.send()
    return transport.receive()


def uneven(transport: Transport, seed: int, known_counts: bool) -> list[np.ndarray]:
    """One random all-to-all; returns copies of what came from each member."""
    width = row_bytes_of(seed)
    sent = payload(seed, transport.index, transport.size, width)
    counts = None
    if known_counts:
        everyone = (payload(seed, i, transport.size, width) for i in range(transport.size))
        counts = [len(rows[transport.index]) for rows in everyone]
    outbox = transport.outbox(width, [len(rows) for rows in sent], counts)
    outbox.copy_(torch.from_numpy(np.concatenate(sent)))
    return [piece.numpy().copy() for piece in received(transport)]


def tokens_of(seed: int, index: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, slot ids and weights of one member's batch; T is 0 now and then."""
    rng = np.random.default_rng((seed, index, 7))
    num = int(rng.integers(0, MAX_TOKENS + 1)) * int(rng.random() < 0.8)
    slots = rng.integers(-1, size * SLOTS, (num, TOP_K))
    hidden = torch.from_numpy(rng.standard_normal((num, HIDDEN), dtype=np.float32)).to(dtype)
    weights = torch.from_numpy(rng.random((num, TOP_K), dtype=np.float32))
    return hidden, torch.from_numpy(slots), weights


def expert_scale(global_slot: torch.Tensor) -> torch.Tensor:
    """A stand-in for an expert: it multiplies by a power of two, so that bfloat16 stays exact."""
    return torch.exp2((global_slot % 5).float())


def partial_sums(rows: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, rank: int):
    """What a rank's experts return for the rows they get: float32 `[R, H]`."""
    factor = torch.where(ids < SLOTS, expert_scale(rank * SLOTS + ids) * scales, 0.0)
    return rows.float() * factor.sum(1, keepdim=True)


def dense_reference(seed: int, index: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The result without any dispatch, summed rank by rank as combine promises."""
    hidden, slots, weights = tokens_of(seed, index, size, dtype)
    total = torch.zeros(hidden.shape)
    for rank in range(size):
        here = slots.div(SLOTS, rounding_mode="floor") == rank
        local = torch.where(here, slots - rank * SLOTS, SLOTS)
        total += partial_sums(hidden, local, torch.where(here, weights, 0.0), rank)
    return total.to(dtype)


def layer(transport: Transport, seed: int, dtype_name: str) -> dict[str, Any]:
    """Dispatch, local experts, combine; returns what the test asserts on."""
    dtype = getattr(torch, dtype_name)
    dispatcher = Dispatcher(transport, SLOTS)
    hidden, slots, weights = tokens_of(seed, transport.index, transport.size, dtype)
    got = dispatcher.dispatch(hidden, slots, weights)
    assert got.slot_ids_RK.dtype == torch.int64
    assert got.weights_RK.dtype == torch.float32
    assert got.rows_RH.dtype == dtype
    sums = partial_sums(got.rows_RH, got.slot_ids_RK, got.weights_RK, transport.index)
    out = dispatcher.combine(sums, got.handle)
    assert out.dtype == dtype
    return {
        "equal": torch.equal(out, dense_reference(seed, transport.index, transport.size, dtype)),
        "rows": len(got.rows_RH),
        "rows_without_expert": int((got.slot_ids_RK == SLOTS).all(1).sum()),
        "weight_on_sentinel": float(got.weights_RK[got.slot_ids_RK == SLOTS].abs().sum()),
    }


class Worker:
    """The main thread of a rank process."""

    def __init__(self, domains: Domains, me: int) -> None:
        self._domains = domains
        self._me = RankId(me)

    def enter(self, spec: dict[str, Any], epoch: int, members: list[int]) -> float:
        started = time.monotonic()
        ranks = tuple(RankId(r) for r in members)
        self._domains.enter(DomainSpec(**spec), Epoch(epoch), ranks, self._me)
        return time.monotonic() - started

    def leave(self) -> float:
        started = time.monotonic()
        self._domains.leave()
        return time.monotonic() - started

    def uneven(self, seeds: list[int], known_counts: bool = False) -> list[list[np.ndarray]]:
        return [uneven(self._transport, seed, known_counts) for seed in seeds]

    def layers(self, seeds: list[int], dtype_name: str) -> list[dict[str, Any]]:
        return [layer(self._transport, seed, dtype_name) for seed in seeds]

    def gather(self, row: list[int]) -> list[list[int]]:
        return self._transport.all_gather_ints(row)

    def become(self, rank: int) -> None:
        """Bear another rank's id from the next epoch on."""
        self._me = RankId(rank)

    def linger_in_outbox(self, pause_s: float) -> None:
        """Fill the outbox for `pause_s` seconds and more, publish it, and exchange once more."""
        transport = self._transport
        outbox = transport.outbox(64, [20] * transport.size)
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            outbox.fill_(0xEE)
        with contextlib.suppress(CommunicationFailed):
            received(transport)
        transport.all_gather_ints([1])

    def uneven_for(self, seconds: float) -> bool:
        """Exchange until member 0's clock says stop; whether every row came unspoilt."""
        transport, until, seed, right = self._transport, time.monotonic() + seconds, 0, True
        while transport.all_gather_ints([int(time.monotonic() > until)])[0][0] == 0:
            got = uneven(transport, seed, known_counts=False)
            for source, rows in enumerate(got):
                sent = payload(seed, source, transport.size, row_bytes_of(seed))
                right &= np.array_equal(rows, sent[transport.index])
            seed += 1
        return right

    def exchange_for_ever(self) -> None:
        seed = 0
        while True:
            uneven(self._transport, seed, known_counts=False)
            seed += 1

    def waited_s(self) -> float:
        return self._transport.waited_s

    def unfreed(self) -> int:
        return self._domains.unfreed

    @property
    def _transport(self) -> Transport:
        (transport,) = self._domains.current
        return transport


def worker_main(me: int, conn: Connection, handed: HandedFd) -> None:
    torch.set_num_threads(1)
    fence = FenceFlag()
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_control, args=(conn, fence, todo), daemon=True).start()
    with Domains(fence, handed.fd) as domains:
        worker = Worker(domains, me)
        while (request := todo.get()) is not None:
            conn.send(_answer(worker, *request))
    conn.send(("bye", None))
    os._exit(0)


def _control(conn: Connection, fence: FenceFlag, todo: "queue.SimpleQueue[Any]") -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            match conn.recv():
                case ("fence", epoch):
                    fence.raise_to(Epoch(epoch))
                case request:
                    todo.put(request)
    os._exit(1)


def _answer(worker: Worker, name: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "ok", getattr(worker, name)(*args)
    except DomainLeft:
        return "left", None
    except CommunicationFailed as error:
        return "failed", (error.silent, str(error))


# ---- the test's side ------------------------------------------------------------------------


class Cluster:
    """Worker processes 0 .. n - 1, all killed and reaped at the end of the `with` block."""

    def __init__(self, num_ranks: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "pytest", "revivemoe.comm.domain"])
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        size = region_bytes(num_ranks, MAX_TOKENS, HIDDEN, 4, TOP_K)
        self._fd = create_segment(num_ranks, size)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(num_ranks):
            self._start(context, rank)

    def _start(self, context: Any, rank: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(rank, theirs, HandedFd(self._fd)))
        process.start()
        theirs.close()
        self.pipes.append(ours)
        self.processes.append(process)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(REPLY_S)
            assert process.exitcode is not None, "a worker outlived its SIGKILL"
        for pipe in self.pipes:
            pipe.close()
        os.close(self._fd)

    def spec(self, backend: str, timeout_s: float = 15.0) -> dict[str, Any]:
        address = f"127.0.0.1:{self.store.port}"
        return {"backend": backend, "store_address": address, "timeout_s": timeout_s}

    def ask(self, ranks: list[int], name: str, *args: Any) -> None:
        for rank in ranks:
            self.pipes[rank].send((name, args))

    def answers(self, ranks: list[int], within_s: float = REPLY_S) -> list[tuple[str, Any]]:
        deadline = time.monotonic() + within_s
        found = []
        for rank in ranks:
            left = max(0.0, deadline - time.monotonic())
            assert self.pipes[rank].poll(left), f"rank {rank} gave no answer in {within_s} s"
            found.append(self.pipes[rank].recv())
        return found

    def call(self, ranks: list[int], name: str, *args: Any) -> list[Any]:
        """Ask all, expect success of all, return their values."""
        self.ask(ranks, name, *args)
        answers = self.answers(ranks)
        assert all(kind == "ok" for kind, _ in answers), answers
        return [value for _, value in answers]

    def fence(self, ranks: list[int], epoch: int) -> None:
        for rank in ranks:
            self.pipes[rank].send(("fence", epoch))

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)
