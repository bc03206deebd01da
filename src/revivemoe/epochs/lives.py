"""Every rank's process from the wish for it to its end: what `rank_life` allows, performed.

Starts, awaits and ends processes, and owes each state's deadline. Nothing else moves a life.
"""

from collections.abc import Callable
from functools import partial

from revivemoe.epochs import rank_life as life
from revivemoe.epochs.obligations import Obligation, Obligations
from revivemoe.epochs.ports import Cluster
from revivemoe.epochs.rank_life import (
    AT_DEADLINE,
    WAITS_FOR,
    Condemned,
    Event,
    Gone,
    Leaving,
    Queued,
    deadline,
    later,
    transition,
)
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.messages.commands import Stop
from revivemoe.messages.events import Launched, LifeChanged, Tell, Unkillable
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy

LAUNCH = "launch"
"""An obligation: a new process as soon as the present one is gone."""


class Lives:
    """Moves every view's `life`."""

    def __init__(
        self, cluster: Cluster, views: dict[RankId, RankView], policy: Policy, tell: Tell
    ) -> None:
        self.obligations = Obligations()
        self.on_late: Callable[[Fault, float], None] = lambda fault, now: None
        """A process has missed a deadline of its life: it is to be accused."""
        self.on_launch: Callable[[RankView, float], None] = lambda view, now: None
        """A new process is asked for, with what `table` says in its slots."""
        self.on_not_coming: Callable[[float], None] = lambda now: None
        """Nobody waits any longer for a rank's new process: plans may depend on it."""
        self._closed = False
        """Nothing is launched any more."""
        self._cluster, self._views = cluster, views
        self._policy, self._tell = policy, tell

    # ---- what is asked for -------------------------------------------------------------------

    def launch(self, rank: RankId, now: float) -> None:
        """Start a (new) process for a rank."""
        view = self._views[rank]
        if self._closed:
            return
        self.obligations.met(LAUNCH, rank)
        spawning = self._move(view, life.Spawn(now + self._policy.spawn_timeout_s), now)
        assert spawning, f"two processes of rank {rank}: {view.life}"
        incarnation = view.renew()
        self.on_launch(view, now)
        self._cluster.launch(rank, incarnation, view.table)
        if incarnation > 1:
            self._tell(Launched(rank, incarnation))

    def queue(self, rank: RankId, at: float, now: float) -> None:
        """Start a new process for a rank without one, later."""
        self._move(self._views[rank], life.Queue(at), now)

    def replace(self, rank: RankId, now: float, delay_s: float = 0.0) -> None:
        """Start a new process for a rank that is out, once the present one is gone. `delay_s`:
        not before, if it is gone already.
        """
        view = self._views[rank]
        assert view.dead, f"rank {rank} is replaced, and not out: {view.life}"
        here = not isinstance(view.life, Gone | Queued)
        if not here and not delay_s:
            self.launch(rank, now)
            return
        patience_s = self._policy.corpse_timeout_s + delay_s
        then = "no new process is started, and the plan is made without one"
        lapse = partial(self._give_up_waiting, rank)
        self.obligations.owe(Obligation(LAUNCH, rank, now, now + patience_s, then, lapse))
        if here:
            self._doom(view, now)
        else:
            self._move(view, life.Queue(now + delay_s), now)

    def end(self, view: RankView, now: float) -> None:
        """It is out, and told nothing any more: it is killed."""
        if not isinstance(view.life, Condemned):
            self._doom(view, now)

    def dismiss(self, view: RankView, now: float) -> None:
        """It has been told to stop: its exit is no fault."""
        self._move(view, self._dismissed(now), now)

    def _dismissed(self, now: float) -> life.Dismissed:
        return life.Dismissed(now + self._policy.leave_timeout_s)

    def _doom(self, view: RankView, now: float, late: bool = False) -> None:
        """Condemned, for the first time or once more; and killed, if it is there by now. Where no
        process was left whose end would start the next one, none is owed any more.
        """
        if isinstance(view.life, Queued):
            self._not_to_come(view)
        if self._move(view, life.Accused(now + self._policy.corpse_timeout_s, late), now):
            self._cluster.kill(view.rank)

    def _give_up_waiting(self, rank: RankId, now: float) -> None:
        """A process that does not die cannot be replaced: its memory may still be written to."""
        self._not_to_come(self._views[rank])
        self._doom(self._views[rank], now, late=True)
        self._tell(Unkillable(rank, self._views[rank].pid))
        self.on_not_coming(now)

    # ---- what becomes of them ----------------------------------------------------------------

    def on_arrived(self, rank: RankId, incarnation: Incarnation, pid: int, now: float) -> None:
        """The process has come into being: for one that is condemned, that is the end."""
        view = self._views[rank]
        if incarnation != view.incarnation:
            return
        assert pid > 0, f"process {pid} of rank {rank}"
        view.pid = pid
        self._move(view, life.Arrived(now + self._policy.spawn_timeout_s), now)
        if isinstance(view.life, Condemned):
            self._cluster.kill(rank)

    def on_hello(self, view: RankView, pid: int, host: str, now: float) -> None:
        """Its first words."""
        view.pid, view.host = pid, host
        self._move(view, life.Spoke(now + self._policy.restart_timeout_s), now)

    def on_ready(self, view: RankView, now: float) -> None:
        """It has loaded."""
        self._move(view, life.Loaded(now + self._policy.join_timeout_s), now)

    def on_exit(self, view: RankView, now: float) -> None:
        """Its process is gone. If another one is owed, it is started."""
        self._move(view, life.Exited(), now)
        if self.obligations.met(LAUNCH, view.rank):
            self.launch(view.rank, now)

    def close(self, now: float, in_good_order: bool = False) -> None:
        """The end: nothing is launched any more, and what is left is killed. `in_good_order`: only
        what cannot be told to stop, for the rest has been.
        """
        self._closed = True
        for view in self._views.values():
            self.obligations.met(LAUNCH, view.rank)
            told = in_good_order and self._move(view, self._dismissed(now), now)
            if not told and not (in_good_order and isinstance(view.life, Leaving)):
                self.end(view, now)

    def call_off(self, view: RankView, now: float) -> None:
        """A rank that is on its way back is not to come."""
        if self.strike(view, now):
            self.on_not_coming(now)

    def strike(self, view: RankView, now: float) -> bool:
        """It is not to come; whoever may have waited for it is not told yet. Whether it was
        awaited: then a plan is to be made anew, once for all that are struck.
        """
        awaited = self._not_to_come(view) or isinstance(view.life, Queued)
        if not self._move(view, self._dismissed(now), now):
            self.end(view, now)
        elif isinstance(view.life, Leaving):
            self._cluster.send(view.rank, Stop())
        return awaited

    def call_off_launch(self, rank: RankId, now: float) -> None:
        """Its process is gone, or on its way out: no other one is to be started."""
        if self._not_to_come(self._views[rank]):
            self.on_not_coming(now)

    def _not_to_come(self, view: RankView) -> bool:
        """Its next process is not to be started. Whether one was owed."""
        view.request_id = None
        return self.obligations.met(LAUNCH, view.rank)

    def drain(self, view: RankView, on: bool, now: float) -> None:
        """Nothing new goes there; or, not `on`, again."""
        self._move(view, life.Drain(on), now)

    def switch(self, view: RankView, aside: bool, now: float) -> None:
        """It has been told to change its role, or, not `aside`, to do so in the next epoch."""
        patience_s = self._policy.restart_timeout_s if aside else self._policy.join_timeout_s
        moved = self._move(view, life.Switch(now + patience_s, aside), now)
        assert moved, f"rank {view.rank} switches its role: {view.life}"

    def take_in(self, view: RankView, epoch: Epoch, now: float) -> None:
        """The epoch has begun, with it."""
        moved = self._move(view, life.TakenIn(epoch), now)
        assert moved, f"rank {view.rank} is no member: {view.life}"

    def _move(self, view: RankView, event: Event, now: float) -> bool:
        """Let the event happen to the rank's life. False if it is refused."""
        after = transition(view.life, event, now)
        if after is None:
            return False
        was, name, until = type(view.life).__name__, type(after).__name__, deadline(after)
        self.obligations.met(was, view.rank)
        lost = isinstance(after, life.OUT) and not view.dead
        if lost or isinstance(after, life.Member):
            view.request_id = None  # what its process was to come in by has come about, or will not
        view.life = after
        if until is not None:
            lapse = partial(self._lapsed, view)
            owed = Obligation(name, view.rank, after.since, until, AT_DEADLINE[name], lapse)
            self.obligations.owe(owed)
        if name != was:
            due_s = None if until is None else until - now
            told = (was.lower(), name.lower(), WAITS_FOR[name], due_s)
            self._tell(LifeChanged(view.rank, view.incarnation, *told))
        return True

    def _lapsed(self, view: RankView, now: float) -> None:
        """The deadline of its state has passed."""
        assert deadline(view.life) is not None, f"rank {view.rank} owes nothing: {view.life}"
        match view.life:
            case Queued():
                self.launch(view.rank, now)
            case Leaving():
                self._doom(view, now)
            case Condemned():
                self._doom(view, now, late=True)
            case _:
                since = now - view.life.since
                detail = f"waited for {since:.0f} s for {WAITS_FOR[type(view.life).__name__]}"
                self.on_late(Fault(view.rank, "start_timeout", detail), now)

    def postpone(self, seconds: float) -> None:
        """The host itself stood still for so long: nobody else is late by that."""
        self.obligations.postpone(seconds)
        for view in self._views.values():
            view.life = later(view.life, seconds)
