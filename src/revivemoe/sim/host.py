"""Hosts the real engine: its inbox, its ticks, its stalls. What `serving` does under asyncio."""

from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random
from typing import assert_never

from revivemoe.engine.engine import Engine
from revivemoe.epochs.rank_life import (
    Condemned,
    Leaving,
    Life,
    Loading,
    Queued,
    Ready,
    Spawning,
    Switching,
)
from revivemoe.epochs.stages import Fencing, Resuming
from revivemoe.epochs.state import FailedState, Paused, Recovering, Serving, Starting
from revivemoe.ids import Incarnation, RankId
from revivemoe.messages.reports import Report
from revivemoe.sim.clock import Clock
from revivemoe.sim.staleness import take

TICK_S = 0.05
LATEST_TICK_S = 1.2

Observer = Callable[[], None]


class EngineHost:
    """Calls into the engine, one at a time; none while it stalls. Each is observed."""

    def __init__(self, clock: Clock, rng: Random, observe: Observer) -> None:
        self.engine: Engine
        self._clock, self._observe = clock, observe
        self._inbox: deque[Callable[[], object]] = deque()
        self._stalled_until = self._late_until = 0.0
        self._rng = rng
        self._stopped = False

    def start(self, engine: Engine) -> None:
        self.engine = engine
        self.call(lambda: engine.start(self._clock.now))
        self._clock.after(TICK_S, self._tick)

    def stop(self) -> None:
        self._stopped = True

    def call(self, action: Callable[[], object]) -> None:
        """Do this in the engine's thread: now, or when its stall is over."""
        if self._clock.now < self._stalled_until:
            self._inbox.append(action)
            return
        action()
        self._observe()

    def on_report(self, report: Report) -> None:
        self.call(lambda: take(self.engine, report, self._clock.now))

    def on_arrived(self, rank: RankId, incarnation: Incarnation, pid: int) -> None:
        self.call(lambda: self.engine.on_arrived(rank, incarnation, pid, self._clock.now))

    def on_exit(self, rank: RankId, incarnation: Incarnation, detail: str, by_itself: bool) -> None:
        told = partial(self.engine.on_exit, rank, incarnation, detail, by_itself=by_itself)
        self.call(lambda: told(now=self._clock.now))

    def tick_late(self, seconds: float) -> None:
        """From now on, for so long, ticks come when they like."""
        self._late_until = self._clock.now + seconds

    @property
    def stalled(self) -> bool:
        """Whether something waits for the end of a stall, or will."""
        return self._clock.now < self._stalled_until or bool(self._inbox)

    def stall(self, seconds: float) -> None:
        """The engine's thread stands still."""
        self._stalled_until = max(self._stalled_until, self._clock.now + seconds)

    def _tick(self) -> None:
        if self._stopped:
            return
        if self._clock.now < self._stalled_until:
            self._clock.at(self._stalled_until, self._tick)
            return
        while self._inbox:
            self.call(self._inbox.popleft())
        self.call(lambda: self.engine.tick(self._clock.now))
        late = self._clock.now < self._late_until
        self._clock.after(self._rng.uniform(TICK_S, LATEST_TICK_S) if late else TICK_S, self._tick)


def stage_of(engine: Engine) -> str:
    """Where the instance stands, in the words of the coverage table."""
    match engine.state:
        case Starting():
            return "starting"
        case Serving():
            return _serving_stage(engine)
        case Recovering():
            return _recovery_stage(engine)
        case Paused():
            return "paused"
        case FailedState():
            return "failed"
        case _:
            assert_never(engine.state)


def _serving_stage(engine: Engine) -> str:
    under_way = {
        "first step": engine.epochs.stall.runs,
        "draining": engine.maintenance.drains.draining,
        "switching": engine.epochs.fleet.switching,
        "loading": engine.epochs.loads.loading,
    }
    return next((stage for stage, what in under_way.items() if what), "serving")


def _recovery_stage(engine: Engine) -> str:
    match engine.epochs.coordinator.state:
        case Fencing(at_boundary=True):
            return "boundary"
        case Resuming(plan=plan) if plan.reloads:
            return "reloading"
        case state:
            return type(state).__name__.lower()


def is_settled(engine: Engine) -> bool:
    """Serving, and no planned change is under way or wanted."""
    epochs = engine.epochs
    return epochs.serving and not (
        engine.maintenance.drains.pending
        or engine.devices.signals.unsettled
        or epochs.loads.loading
        or epochs.loads.loaded
        or any(_is_moving(view.life) for view in engine.ranks.values())
        or any(engine.maintenance.returns.wants(view) for view in engine.ranks.values())
    )


def _is_moving(life: Life) -> bool:
    """Whether something more will become of it, as far as can be foreseen."""
    moving = (Queued, Spawning, Loading, Ready, Switching, Leaving)
    awaited = isinstance(life, Condemned) and not (life.arrived or life.overdue)
    return awaited or isinstance(life, moving)
