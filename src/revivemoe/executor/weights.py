"""Experts' weights from peer to peer: every rank serves the rows its slots hold, in a thread.

Beside the domain, so that a rank can load from its peers while all of them run steps. One request,
`(layer, expert)`; one answer: its parameters as in a safetensors file, or nothing if the expert is
not here (any more).
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import msgspec
import torch
import zmq
from safetensors import SafetensorError
from safetensors.torch import load, save

from revivemoe.ids import ExpertId, LayerId, RankId
from revivemoe.membership.membership import Membership
from revivemoe.messages.complaints import Complaints, say

Rows = dict[str, torch.Tensor]
PEER_TIMEOUT_S = 2.0
"""For one expert to come from a peer; after that another source is asked."""
JOIN_S = 0.5
"""For an answer under way when the rank ends."""
POLL_S = 5.0
"""Between two looks at nothing; a request or the end is seen at once."""


Wanted = tuple[LayerId, ExpertId]
NOT_HERE = b""


class WeightServer:
    """Serves this rank's slots. A context manager: the thread runs inside the `with`."""

    def __init__(self, endpoint: str, find: Callable[[LayerId, ExpertId], Rows | None]) -> None:
        """`find`: copies of an expert's rows on the host; called from the thread."""
        self._endpoint, self._find = endpoint, find
        self._unanswered = Complaints(f"{endpoint}: requests that cannot be answered", say)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def __enter__(self) -> "WeightServer":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(timeout=JOIN_S)

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(self._endpoint)
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._stop_fd, zmq.POLLIN)
            while self._stop_fd not in (ready := dict(poller.poll(round(POLL_S * 1000)))):
                if socket in ready:
                    socket.send(self._answer(socket.recv_multipart()))

    def _answer(self, request: list[bytes]) -> bytes:
        """What it cannot answer it does not have: peers are to be served after that, too."""
        try:
            (raw,) = request
            return pack(self._find(*msgspec.msgpack.decode(raw, type=Wanted)))
        except Exception as error:
            self._unanswered.add(error, time.monotonic())
            return NOT_HERE


class PeerSource:
    """An `ExpertSource`: whoever holds a replica by the map is asked for it."""

    name = "peer"

    def __init__(self, membership: Membership, endpoints: Mapping[RankId, str], me: RankId) -> None:
        """`membership`: of the epoch in which the replicas are live."""
        self._membership, self._endpoints, self._me = membership, endpoints, me
        self._silent: set[RankId] = set()
        """Peers that did not answer once: they are not asked again."""

    def fetch(self, layer: LayerId, expert: ExpertId) -> Rows | None:
        for rank, _ in self._membership.holders(layer, expert):
            if rank == self._me or rank in self._silent or rank not in self._endpoints:
                continue
            try:
                rows = self._ask(rank, (layer, expert))
            except (zmq.ZMQError, SafetensorError):  # no socket, or no rows in the answer
                self._silent.add(rank)
                continue
            if rows is not None:
                return rows
        return None

    def _ask(self, rank: RankId, wanted: Wanted) -> Rows | None:
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._endpoints[rank])
            socket.send(msgspec.msgpack.encode(wanted))
            if not socket.poll(round(PEER_TIMEOUT_S * 1000)):
                self._silent.add(rank)
                return None
            return unpack(socket.recv())


def pack(rows: Rows | None) -> bytes:
    """An answer."""
    return NOT_HERE if rows is None else save({name: t.contiguous() for name, t in rows.items()})


def unpack(answer: bytes) -> Rows | None:
    """The rows in an answer; None if the expert was not there."""
    return load(answer) if answer else None
