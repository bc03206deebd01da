"""The rank's second thread: takes commands, raises the fence, sends heartbeats.

It never waits for the step loop, so a fence reaches a rank that is stuck in an exchange. It ends
the process when the engine is gone: an orphan rank would hold its memory and its device for ever.
"""

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import zmq

from revivemoe.comm.fence import FenceFlag
from revivemoe.core.progress import Progress
from revivemoe.executor.spec import RankSpec
from revivemoe.messages.commands import Command, Fence
from revivemoe.messages.complaints import Complaints, say
from revivemoe.messages.reports import ExpertsLoaded, Heartbeat, Hello, RankStats, Report
from revivemoe.messages.tally import Tally

Told = tuple[RankStats, Tally | None]
"""Of a rank's load, and of what it holds."""
PACE_EVERY = 10
"""Heartbeats from one that tells the pace to the next."""
DEAF = 3
"""Exit status of a rank whose control thread failed."""
ENGINE_GONE = 4
"""Exit status of a rank whose engine went away."""


class ControlThread:
    """Owns the command socket (the rank binds it, the engine connects). A context manager:
    the thread runs inside the `with`."""

    def __init__(
        self,
        spec: RankSpec,
        lifeline: int,
        fence: FenceFlag,
        progress: Progress,
        told: Callable[[], Told],
        report: Callable[[Report], None],
    ) -> None:
        """`lifeline`: read end of a pipe whose write end only the engine holds. `told`: for the
        heartbeats. `report`: may be called from the thread.
        """
        self.commands: queue.SimpleQueue[Command | ExpertsLoaded] = queue.SimpleQueue()
        self._spec, self._lifeline = spec, lifeline
        self._fence, self._progress = fence, progress
        self._told, self._report = told, report
        self._beats = 0
        self._stopping = threading.Event()
        self._garbled = Complaints(f"rank {spec.rank}: commands that cannot be decoded", say)
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._thread = threading.Thread(target=self._run_or_exit, name="control", daemon=True)

    def __enter__(self) -> "ControlThread":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=2 * self._spec.heartbeat_s + 1.0)

    def _run_or_exit(self) -> None:
        """A rank that has gone deaf must not live on: its exit is what its owner can see."""
        try:
            self._run()
        except Exception:
            sys.stderr.write(f"rank {self._spec.rank}: control thread: {traceback.format_exc()}")
            sys.stderr.flush()
            os._exit(DEAF)

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
            inbox.setsockopt(zmq.RCVHWM, 0)
            inbox.bind(self._spec.commands)
            hello = Hello(self._spec.rank, self._spec.incarnation, os.getpid(), os.uname().nodename)
            self._report(hello)
            poller = zmq.Poller()
            poller.register(inbox, zmq.POLLIN)
            poller.register(self._lifeline, zmq.POLLIN)
            while not self._stopping.is_set():
                self._turn(inbox, poller)
                self._report(self._heartbeat())

    def _turn(self, inbox: "zmq.Socket[bytes]", poller: zmq.Poller) -> None:
        """Serve whatever comes until the next heartbeat is due."""
        until = time.monotonic() + self._spec.heartbeat_s
        while (left_s := until - time.monotonic()) > 0 and not self._stopping.is_set():
            ready = dict(poller.poll(max(1, round(left_s * 1000))))
            if self._lifeline in ready:
                os._exit(ENGINE_GONE)
            if inbox in ready:
                self._take(inbox.recv())

    def _take(self, raw: bytes) -> None:
        try:
            command = self._decoder.decode(raw)
        except Exception as error:  # whoever sent it: what the engine sends is still to be heard
            self._garbled.add(error, time.monotonic())
            return
        if isinstance(command, Fence) and not command.at_boundary:
            self._fence.raise_to(command.epoch)
        self.commands.put(command)

    def _heartbeat(self) -> Heartbeat:
        self._beats += 1
        progress, me = self._progress, (self._spec.rank, self._spec.incarnation)
        pace = progress.paces() if self._beats % PACE_EVERY == 0 else None
        stats, holdings = self._told()
        return Heartbeat(*me, progress.count, stats, progress.activity(), pace, holdings)
