"""One simulated rank process: its life, its control thread, and what drives its step loop.

Mirrors `executor.control`: commands come in and raise the fence at once, whatever the step loop
does; heartbeats go out on their own.
"""

from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from random import Random
from typing import Protocol, assert_never

from revivemoe.core.effects import Broken, Left
from revivemoe.core.progress import Progress
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.commands import Command, Fence, Stop
from revivemoe.messages.reports import ExpertsLoaded, Heartbeat, Hello, RankStats, Report
from revivemoe.messages.tally import Tally
from revivemoe.sim.clock import Clock
from revivemoe.sim.domain import Domain
from revivemoe.sim.requests import Idle, Meet, Request, Work

HEARTBEAT_S = 0.1
BEATS_PER_PACE = 3
IDLE_TICK_S = 0.5
"""A parked loop looks for commands so often, at least."""
WAIT_TIMEOUT_S = 4.0
"""Bound on every wait in a domain, looked at with each heartbeat. Shorter than usual, for the sake
of virtual time."""
POLL_S = 0.0003
"""Within this time a wait sees that its exchange is complete, or that it is fenced."""

StepLoop = Generator[Request, list[object] | None, None]


class Host(Protocol):
    clock: Clock
    rng: Random

    def on_arrived(self, process: "Process") -> None: ...

    def on_exit(self, process: "Process", detail: str) -> None: ...

    def reach(self, process: "Process", phase: str, layer: int, meets: bool) -> float:
        """A step loop gets to a new place; there it `meets` the others, or not. Returns how much
        slower than normal its work is."""


class Process:
    """A process of one rank: alive, stopped (SIGSTOP) or dead; its step loop may hang."""

    def __init__(
        self, host: Host, rank: RankId, incarnation: Incarnation, say: Callable[[Report], None]
    ) -> None:
        self.rank, self.incarnation = rank, incarnation
        self.alive, self.stopped, self.hung = True, False, False
        self.arrived = False
        """The engine has a handle on it. Before, it does nothing, and no kill can reach it."""
        self.deaf = False
        """It does not stop when told to."""
        self.unkillable = False
        """A SIGKILL has no effect."""
        self.kill_pending = False
        """One was sent nevertheless."""
        self.inbox: deque[Command | ExpertsLoaded] = deque()
        self.fenced = Epoch(0)
        """Every wait in a domain below this epoch ends at once."""
        self.domain: Domain | None = None
        self.stats: Callable[[], RankStats] = RankStats
        self.holdings: Callable[[], Tally | None] = lambda: None
        self.progress = Progress(lambda: host.clock.now)
        self.step = 0
        self.met = Epoch(0)
        """The last epoch in which it has met all others."""
        self.doing: Request = Idle()
        self._host, self._say = host, say
        self._loop: StepLoop | None = None
        self._num_exchanges = 0
        self._wait = 0
        """Counts what the step loop has waited for: an answer to an earlier wait is stale."""
        self._since = 0.0
        self._beats = 0
        self._frozen: list[Callable[[], None]] = []
        """What happens once a stopped process goes on."""

    @property
    def now(self) -> float:
        return self._host.clock.now

    # ---- life --------------------------------------------------------------------------------

    def start(self, loop: StepLoop, start_s: float) -> None:
        """It comes into being after half of that time, and says so after the rest."""
        self._loop = loop
        self._host.clock.after(start_s / 2, partial(self._arrive, start_s / 2))

    def _arrive(self, start_s: float) -> None:
        if self.alive:
            self.arrived = True
            self._host.on_arrived(self)
            self._host.clock.after(start_s, self._begin)

    def _begin(self) -> None:
        if self.alive:
            self.report(Hello(self.rank, self.incarnation, 1000 + self.rank, "sim"))
            self._beat()
            self._advance(None)

    def die(self, detail: str) -> None:
        """The process ends, whatever it was doing."""
        if not self.alive:
            return
        self.alive = False
        self.leave_domain()
        self._host.on_exit(self, detail)

    def kill(self) -> None:
        self.kill_pending = True
        if not self.unkillable:
            self.die("killed by signal 9")

    def stop(self) -> None:
        """SIGSTOP: neither thread runs."""
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped = False
        frozen, self._frozen = self._frozen, []
        for action in frozen:
            action()

    def _is_held(self, action: Callable[[], None]) -> bool:
        """Whether this cannot happen now: never to the dead, later to the stopped."""
        if self.alive and self.stopped:
            self._frozen.append(action)
        return not self.alive or self.stopped

    def report(self, report: Report) -> None:
        if self.alive:
            self._say(report)

    # ---- control thread ----------------------------------------------------------------------

    def deliver(self, command: Command) -> None:
        """A command has reached the process."""
        if self._is_held(partial(self.deliver, command)):
            return
        if self.deaf and isinstance(command, Stop):
            return
        if isinstance(command, Fence) and not command.at_boundary:
            self.fenced = max(self.fenced, command.epoch)
        self.hand(command)
        if isinstance(self.doing, Meet) and self._is_fenced():
            self._later(self._leave_wait)

    def hand(self, command: Command | ExpertsLoaded) -> None:
        """Give the step loop something to handle between steps."""
        self.inbox.append(command)
        if isinstance(self.doing, Idle):
            self._later(partial(self._advance, None))

    def _beat(self) -> None:
        if self._is_held(self._beat):
            return
        if isinstance(self.doing, Meet) and self.now - self._since > WAIT_TIMEOUT_S:
            self.fail_wait(f"{self.doing.phase} not complete after {WAIT_TIMEOUT_S:g} s")
        self._beats += 1
        progress, me = self.progress, (self.rank, self.incarnation)
        pace = progress.paces() if self._beats % BEATS_PER_PACE == 0 else None
        self.report(
            Heartbeat(*me, progress.count, self.stats(), progress.activity(), pace, self.holdings())
        )
        self._host.clock.after(HEARTBEAT_S, self._beat)

    # ---- the step loop's waits ---------------------------------------------------------------

    def enter_domain(self, domain: Domain) -> None:
        assert self.domain is None, f"rank {self.rank} enters a domain and is still in another"
        self.domain, self._num_exchanges = domain, 0

    def leave_domain(self) -> None:
        if self.domain is not None:
            self.domain.leave(self.rank)
            self.domain = None

    def fail_wait(self, detail: str) -> None:
        """The transport fails under a rank that waits for its peers."""
        if isinstance(self.doing, Meet):
            self._later(partial(self._throw, Broken(detail)))

    def reach(self, phase: str) -> bool:
        """The step loop begins a phase. Returns whether it may simply go on: whoever has been
        stopped, or killed, has to wait here.
        """
        self._host.reach(self, phase, -1, False)
        return self.alive and not self.hung and not self.stopped

    def _is_fenced(self) -> bool:
        return self.domain is None or self.domain.epoch < self.fenced

    def _leave_wait(self) -> None:
        self._throw(Left())

    def _later(self, action: Callable[[], None], delay_s: float | None = None) -> None:
        """End the present wait with this action, unless something else ends it first."""
        if delay_s is None:
            delay_s = self._host.rng.random() * POLL_S
        self._host.clock.after(delay_s, partial(self._end_wait, self._wait, action))

    def _end_wait(self, wait: int, action: Callable[[], None]) -> None:
        again = partial(self._end_wait, wait, action)
        if wait == self._wait and not self.hung and not self._is_held(again):
            action()

    def _advance(self, answer: list[object] | None) -> None:
        self._resume(lambda loop: loop.send(answer))

    def _throw(self, error: Exception) -> None:
        self._resume(lambda loop: loop.throw(error))

    def _resume(self, go_on: Callable[[StepLoop], Request]) -> None:
        assert self._loop is not None
        if isinstance(self.doing, Meet):
            self.progress.waits(False)
        try:
            self._follow(go_on(self._loop))
        except StopIteration:
            self.die("exited with status 0")

    def _follow(self, request: Request) -> None:
        self._wait += 1
        self.doing, self._since = request, self._host.clock.now
        match request:
            case Idle():
                self._later(partial(self._advance, None), IDLE_TICK_S)
            case Work(phase=phase, layer=layer):
                slower = self._host.reach(self, phase, layer, False)
                self._later(partial(self._advance, None), request.seconds * slower)
            case Meet(phase=phase, layer=layer):
                self.progress.waits(True)
                self._host.reach(self, phase, layer, True)
                self._meet(request)
            case _:
                assert_never(request)

    def _meet(self, request: Meet) -> None:
        if self.hung or self._is_held(partial(self._meet, request)):
            return
        if self._is_fenced():
            self._later(self._leave_wait, 0.0)
            return
        assert self.domain is not None
        wait = self._wait
        self._num_exchanges += 1

        def wake(values: list[object]) -> None:
            if wait == self._wait:
                self._later(partial(self._advance, values))

        def fail(detail: str) -> None:
            if wait == self._wait:
                self.fail_wait(detail)

        self.domain.publish(self._num_exchanges, self.rank, request.value, wake, fail)
