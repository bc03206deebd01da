"""Transport over a process group of `torch.distributed`, built directly and never waited for.

There is no global group (`init_process_group`), so there is none to tear down. A wait polls
`work.is_completed()` beside the fence. Work that is left behind runs on in the library's threads
until its own time-out, on buffers and a group that the graveyard keeps alive for it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch
from torch.distributed import AllToAllOptions, ProcessGroup, Work

from revivemoe.comm.fence import CommunicationFailed
from revivemoe.comm.sockets import hang_up
from revivemoe.comm.transport import EVERYBODY, MAX_INTS, Flow, Transport
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

T = TypeVar("T")

_GRACE_S = 5.0
"""Beyond its time-out, how long abandoned work is kept before it may be freed."""
_LOOK_S = 0.02
"""How often abandoned work is looked at."""


class Graveyard:
    """Groups, work and buffers that were left behind, until nothing can touch them any more.

    To free a group is to join its threads, which blocks while a collective is stuck in one: so each
    has a thread that waits for that, and frees it. (An unfreed gloo group can cost a core: its loop
    spins on a connection whose buffer is gone, and starves whoever shares the host.)
    """

    def __init__(self) -> None:
        self._graves: list[list[object]] = []

    def bury(self, remains: list[object], done: Callable[[], bool], timeout_s: float) -> None:
        """Free `remains`, which become empty, once `done()` or its time-out has surely passed.

        `done` is asked again and again, in a thread of its own.
        """
        held, until = remains.copy(), time.monotonic() + timeout_s + _GRACE_S
        remains.clear()
        self._graves.append(held)

        def linger() -> None:
            try:
                while time.monotonic() < until and not done():
                    time.sleep(_LOOK_S)
            except OSError:  # no descriptor is free to look with
                time.sleep(max(0.0, until - time.monotonic()))
            self._graves.remove(held)
            held.clear()

        threading.Thread(target=linger, name="free-group", daemon=True).start()

    def __len__(self) -> int:
        """How many are not freed yet."""
        return len(self._graves)


def build_bounded(
    build: Callable[[], T], waiter: Waiter, members: tuple[RankId, ...], me: RankId
) -> T:
    """Run `build` in a helper thread, which is abandoned at the fence or the time limit."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(build())
        except Exception as error:  # the boundary of a thread: it travels in the future
            result.set_exception(error)

    threading.Thread(target=run, name="build-group", daemon=True).start()
    others = tuple(rank for rank in members if rank != me)
    waiter.until(result.done, "build the group", lambda: others)
    try:
        return result.result()
    except RuntimeError as error:
        raise CommunicationFailed("build the group", others, str(error)) from error


class GroupTransport(Transport):
    """Over gloo or NCCL."""

    def __init__(
        self,
        group: ProcessGroup,
        waiter: Waiter,
        epoch: Epoch,
        members: tuple[RankId, ...],
        me: RankId,
        device: torch.device,
        timeout_s: float,
        graveyard: Graveyard,
        *,
        pin: bool,
        connections: frozenset[int] | None,
    ) -> None:
        """`pin`: page-lock host buffers. `connections`: hung up when work is left behind, so that
        it ends (gloo, which cannot cancel it). Not before the epoch is fenced, and freed neither:
        others would take it for a broken link. None: the library aborts it itself (NCCL).
        """
        super().__init__(waiter, epoch, members, me, device)
        self.group: ProcessGroup | None = group
        """None once it is left."""
        self._others = tuple(rank for rank in members if rank != me)
        self._pin = pin
        self._timeout_s, self._graveyard, self._connections = timeout_s, graveyard, connections
        self._rows_to: list[int] = []
        self._outbox = self._buffer(0, 0)
        self._rows_from: list[int] | None = None
        self._counts = torch.empty(0, dtype=torch.int64)
        self._counts_told = True
        """Whether the caller knew them, on every member."""
        self._waits = True
        """Whether anybody may send rows here."""
        self._inbox: torch.Tensor | None = None
        self._in_flight: list[tuple[Work | None, object]] = []
        """Work that is not known to be complete, with its buffers, oldest first."""

    def all_gather_ints(self, row: Sequence[int]) -> list[list[int]]:
        assert len(row) <= MAX_INTS, f"{len(row)} ints: more than {MAX_INTS}"
        mine = torch.tensor(row, dtype=torch.int64, device=self.device)
        all_rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._start(
            "exchange of ints", lambda group: group.allgather([all_rows], [mine]), (mine, all_rows)
        )
        self._complete("exchange of ints")
        return torch.stack(all_rows).tolist()

    @property
    def broken(self) -> bool:
        """Whether work was left behind."""
        return bool(self._in_flight)

    def outbox(
        self,
        row_bytes: int,
        rows_to: Sequence[int],
        rows_from: Sequence[int] | None = None,
        flow: Flow = EVERYBODY,
    ) -> torch.Tensor:
        self._waiter.check_fence()
        self._rows_to = list(rows_to)
        self._rows_from = None if rows_from is None else list(rows_from)
        self._counts_told = rows_from is not None
        self._waits = flow.senders != ()
        if not self._waits:
            self._rows_from = [0] * self.size
        self._outbox = self._buffer(sum(rows_to), row_bytes)
        return self._outbox

    def send(self) -> None:
        if not self._counts_told:
            sent = torch.tensor(self._rows_to, dtype=torch.int64, device=self.device)
            self._counts = torch.empty_like(sent)
            ones = [1] * self.size
            self._start_all_to_all("exchange of row counts", self._counts, sent, ones, ones)
        if self._rows_from is not None:
            self._send_rows(self._rows_from)

    def _send_rows(self, rows_from: list[int]) -> None:
        self._inbox = self._buffer(sum(rows_from), self._outbox.shape[1])
        self._start_all_to_all("all-to-all", self._inbox, self._outbox, rows_from, self._rows_to)

    def receive(self) -> list[torch.Tensor]:
        if self._rows_from is None:  # it follows from what the others tell
            self._complete("exchange of row counts")
            self._rows_from = self._counts.tolist()
            self._send_rows(self._rows_from)
        if self._waits:
            self._complete("all-to-all")
        assert self._inbox is not None, "received before sent"
        return list(self._inbox.split(self._rows_from))

    def close(self) -> None:
        """Leave, and let the group be freed. Waits for nobody."""
        group, self.group = self.group, None
        if group is None:
            return
        remains, stuck = [group, *self._in_flight], [work for work, _ in self._in_flight]
        self._in_flight = []
        if self._connections is None:  # in a thread, for an abort may block too
            threading.Thread(target=_abort, args=(group,), name="abort-group", daemon=True).start()
            stuck = [None]  # what a device still does after it cannot be told
        del group
        self._graveyard.bury(remains, partial(self._ended, stuck), self._timeout_s)

    def _ended(self, stuck: list[Work | None]) -> bool:
        """Whether all of this work is over. What is not, and is nobody's any more, is ended."""
        if not self._waiter.fenced:
            return False
        if stuck and self._connections:
            hang_up(self._connections)
            self._connections = frozenset()
        return all(work is not None and work.is_completed() for work in stuck)

    def _start_all_to_all(
        self,
        name: str,
        received: torch.Tensor,
        sent: torch.Tensor,
        rows_from: list[int],
        rows_to: list[int],
    ) -> None:
        self._start(
            name,
            lambda group: group.alltoall_base(
                received, sent, rows_from, rows_to, AllToAllOptions()
            ),
            (received, sent),
        )

    def _start(self, name: str, start: Callable[[ProcessGroup], Work], buffers: object) -> None:
        """Start a collective; until it is complete its remains stay in `_in_flight`."""
        assert self.group is not None, "the transport is closed"
        self._waiter.check_fence()
        self._in_flight.append((None, buffers))
        try:
            self._in_flight[-1] = (start(self.group), buffers)
        except RuntimeError as error:
            raise CommunicationFailed(name, self._others, str(error)) from error

    def _complete(self, waited_for: str) -> None:
        """Wait for everything in flight. Raises what went wrong with it."""
        try:
            while self._in_flight:
                work, _ = self._in_flight[0]
                assert work is not None, "waited for what did not start"
                self._waiter.until(work.is_completed, waited_for, lambda: self._others)
                work.wait()  # complete already: raises what went wrong
                self._in_flight.pop(0)
        except RuntimeError as error:
            raise CommunicationFailed(waited_for, self._others, str(error)) from error

    def _buffer(self, rows: int, row_bytes: int) -> torch.Tensor:
        return torch.empty(
            rows, row_bytes, dtype=torch.uint8, device=self.device, pin_memory=self._pin
        )


def _abort(group: ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):  # the communicator is in error already
        group.abort()
