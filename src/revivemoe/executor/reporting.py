"""The way to the engine: one socket for all threads of a rank.

So whatever one thread sends after another one has sent something also arrives after it: a heartbeat
tells of tokens only behind the tokens themselves.
"""

import threading

import msgspec
import zmq

from revivemoe.messages.reports import Report

LINGER_MS = 500
"""For last words."""


class ReportSocket:
    """Sends from any thread and never blocks. A context manager: it is open inside the `with`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        """A socket may be used by several threads one after the other, not at once."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._encoder = msgspec.msgpack.Encoder()

    def __enter__(self) -> "ReportSocket":
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(self._endpoint)
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._socket.close()
        self._context.term()

    def send(self, report: Report) -> None:
        """Once it is closed nothing is sent: a thread may end a little later than the rank."""
        with self._lock:
            if not self._socket.closed:
                self._socket.send(self._encoder.encode(report))
