"""Rank processes from the launch that was asked for to the exit that was told.

    launch --> Awaited (waits for a warm fork server; sent) --> Running --> told

Each has one entry until its exit is told. None runs without a pidfd here: its fork server lets it
go on only once that is handed over, so what has not come when the fork server is gone never will.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from revivemoe.cluster.exits import ending
from revivemoe.cluster.forkserver import Exited, Launched, Unlaunched, Warm
from revivemoe.cluster.launcher import LaunchedProcess, Launcher
from revivemoe.cluster.oom import OomKiller, counters
from revivemoe.executor.spec import RankSpec
from revivemoe.ids import Incarnation, RankId

log = logging.getLogger("revivemoe.cluster")

STATUS_WAIT_S = 0.05
"""How long an exit waits for its exit status: without it, requests are suspected that may be
innocent. It takes longer only on a host that is short of processor time."""
WARM_WITHIN_S = 120.0
"""For a fork server to have imported what ranks need."""
ANSWER_WITHIN_S = 20.0
"""A fork server that takes longer to fork is stuck, and is replaced; its ranks live on."""
LOST = "the fork server ended before its process came"

Key = tuple[RankId, Incarnation]


@dataclass(frozen=True)
class ProcessCallbacks:
    """What is told of processes. None may raise."""

    on_arrived: Callable[[Key, int], None]
    """With its pid."""
    on_exit: Callable[[Key, str, bool], None]
    """With what is known of it, and whether the process brought it about."""
    on_forkserver_gone: Callable[[], None]


@dataclass
class Awaited:
    """Asked for, and not here yet."""

    spec: RankSpec
    sent: bool = False
    """Whether the fork server has been asked."""
    condemned: bool = False
    """It is killed when it comes."""


@dataclass
class Running:
    """Here, and its exit not told yet."""

    pid: int
    pidfd: int
    killed: bool = False
    """By us."""
    orphan: bool = False
    """Its fork server is gone: nobody will tell its exit status."""
    status: int | None = None
    told_by: asyncio.TimerHandle | None = None
    """It is gone, and its exit is told by then, with its exit status or without."""


class Processes:
    """Owns the fork server and the pidfds."""

    def __init__(self, launcher: Launcher, callbacks: ProcessCallbacks) -> None:
        self._launcher, self._callbacks = launcher, callbacks
        self._table: dict[Key, Awaited | Running] = {}
        self._oom_killer = OomKiller(counters())
        self._warm = False
        self._watched: int | None = None
        """The fork server's socket; None: it is gone."""
        self._cold: asyncio.TimerHandle | None = None
        """Runs until the fork server is warm."""

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def start(self) -> None:
        """Start the fork server."""
        self._launcher.start()
        self._watch_launcher()

    async def close(self) -> None:
        """End all of them. Nothing is told any more."""
        self._unwatch_launcher()
        for process in self._table.values():
            if isinstance(process, Running):
                _kill(process.pidfd)
                self._release(process)
        self._table.clear()
        await self._loop.run_in_executor(None, self._launcher.close)

    # ---- what is asked for -------------------------------------------------------------------

    def launch(self, spec: RankSpec) -> None:
        """Ask for a process. Never raises: what cannot be launched is told as an exit."""
        key = (spec.rank, spec.incarnation)
        assert key not in self._table, f"rank {key[0]}.{key[1]} is launched twice"
        self._table[key] = Awaited(spec)
        if self._watched is None:
            self._restart()
        self._ask()

    def kill(self, key: Key) -> None:
        """SIGKILL; if it has not come yet, it does not come to life. May be said again."""
        match self._table.get(key):
            case Running() as running:
                running.killed = running.killed or running.told_by is None
                _kill(running.pidfd)
            case Awaited(sent=True) as awaited:
                awaited.condemned = True
            case Awaited():
                self._lose(key, "killed before its process was asked for")
            case None:
                pass  # its exit has been told, or is about to be

    def pid(self, key: Key) -> int | None:
        """None unless it runs."""
        process = self._table.get(key)
        return process.pid if isinstance(process, Running) else None

    @property
    def running(self) -> int:
        return sum(isinstance(process, Running) for process in self._table.values())

    # ---- the fork server ---------------------------------------------------------------------

    def _watch_launcher(self) -> None:
        self._cold = self._loop.call_later(WARM_WITHIN_S, self._give_up_warming)
        self._watched = self._launcher.fileno
        self._loop.add_reader(self._watched, self._on_launcher)

    def _give_up_warming(self) -> None:
        """One that is stuck in its imports is replaced: whatever waits for it is told as lost."""
        log.warning("fork server: not warm after %.0f s: replaced", WARM_WITHIN_S)
        self._launcher.kill()

    def _stop_the_clock(self) -> None:
        if self._cold is not None:
            self._cold.cancel()
            self._cold = None

    def _unwatch_launcher(self) -> None:
        self._stop_the_clock()
        if self._watched is not None:
            self._loop.remove_reader(self._watched)
            self._loop.remove_writer(self._watched)
        self._watched, self._warm = None, False

    def _restart(self) -> None:
        """A new one is warm in a few seconds; what is to start waits for it."""
        try:
            self._launcher.restart()
        except OSError as error:
            self._lose_awaited(f"the fork server could not be started: {error}")
        else:
            self._watch_launcher()

    def _ask(self) -> None:
        """Send what waits to a warm fork server, as far as its socket takes it."""
        if self._watched is None or not self._warm:
            return
        self._loop.remove_writer(self._watched)
        for key, process in list(self._table.items()):
            if not isinstance(process, Awaited) or process.sent:
                continue
            try:
                self._launcher.launch(process.spec)
            except BlockingIOError:
                self._loop.add_writer(self._watched, self._ask)
                return
            except OSError as error:
                self._loop.call_soon(self._on_refusal, key, error)
            else:
                process.sent = True
                self._loop.call_later(ANSWER_WITHIN_S, self._look_for_answer, key)

    def _look_for_answer(self, key: Key) -> None:
        if isinstance(self._table.get(key), Awaited):
            log.warning("fork server: no process of rank %d.%d: replaced", *key)
            self._launcher.kill()

    def _on_refusal(self, key: Key, error: OSError) -> None:
        """The fork server could not be asked: it is gone, or this one launch is lost."""
        self._on_launcher()
        process = self._table.get(key)
        if isinstance(process, Awaited) and not process.sent:
            self._lose(key, f"the fork server could not be asked: {error}")

    def _on_launcher(self) -> None:
        while self._watched is not None:
            try:
                message = self._launcher.receive()
            except BlockingIOError:
                return
            match message:
                case Warm():
                    log.info("fork server warm after %.1f s", message.preload_s)
                    self._warm = True
                    self._stop_the_clock()
                    self._ask()
                case LaunchedProcess():
                    self._on_launched(message.launched, message.pidfd)
                case Unlaunched():
                    self._lose(_key(message), f"it could not be forked: {message.reason}")
                case Exited():
                    self._on_status(_key(message), message.status)
                case None:
                    self._on_forkserver_gone()

    def _on_forkserver_gone(self) -> None:
        self._unwatch_launcher()
        for process in self._table.values():
            if isinstance(process, Running):
                process.orphan = True
        self._lose_awaited(LOST)
        self._callbacks.on_forkserver_gone()

    def _lose_awaited(self, detail: str) -> None:
        for key in [key for key, p in self._table.items() if isinstance(p, Awaited)]:
            self._lose(key, detail)

    def _lose(self, key: Key, detail: str) -> None:
        """It will not come. Told soon: whoever asks for something is not told of it meanwhile."""
        del self._table[key]
        self._loop.call_soon(self._callbacks.on_exit, key, detail, False)

    # ---- a process ---------------------------------------------------------------------------

    def _on_launched(self, launched: Launched, pidfd: int | None) -> None:
        key = _key(launched)
        if pidfd is None:  # no descriptor was free for it
            with contextlib.suppress(ProcessLookupError):
                os.kill(launched.pid, signal.SIGKILL)
            self._lose(key, "its process came without a handle")
            return
        awaited = self._table[key]
        assert isinstance(awaited, Awaited), f"two processes of rank {key[0]}.{key[1]}"
        self._table[key] = Running(launched.pid, pidfd, killed=awaited.condemned)
        self._loop.add_reader(pidfd, self._on_exit, key)
        if awaited.condemned:
            _kill(pidfd)
        self._callbacks.on_arrived(key, launched.pid)

    def _on_status(self, key: Key, status: int) -> None:
        running = self._table.get(key)
        if isinstance(running, Running):
            running.status = status
            if running.told_by is not None:
                self._tell_exit(key)

    def _on_exit(self, key: Key) -> None:
        """The process is gone. How it ended, the fork server says about now."""
        running = self._table[key]
        assert isinstance(running, Running)
        self._loop.remove_reader(running.pidfd)
        running.told_by = self._loop.call_later(STATUS_WAIT_S, self._tell_exit, key)
        self._on_launcher()
        if running.status is not None or running.orphan:
            self._tell_exit(key)

    def _tell_exit(self, key: Key) -> None:
        running = self._table.pop(key, None)
        if running is None:
            return  # told already
        assert isinstance(running, Running)
        self._release(running)
        struck = self._oom_killer.struck(self._loop.time())
        how, by_itself = ending(running.status, running.killed, struck)
        self._callbacks.on_exit(key, f"process {running.pid}: {how}", by_itself)

    def _release(self, running: Running) -> None:
        if running.told_by is not None:
            running.told_by.cancel()
        self._loop.remove_reader(running.pidfd)
        os.close(running.pidfd)


def _key(message: Launched | Unlaunched | Exited) -> Key:
    return RankId(message.rank), Incarnation(message.incarnation)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has gone meanwhile
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
