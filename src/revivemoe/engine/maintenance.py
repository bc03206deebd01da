"""Planned changes of the membership: made at a step boundary, with nothing rolled back.

    drain    a rank goes: what it holds is made ready elsewhere first, then it leaves (`drains`)
    rejoin   a rank comes back: its new process is taken in once it has loaded
    return   lost ranks come back by themselves (`returns`)
    restore  experts that were loaded beside the steps are taken into use
    pause    all ranks stop together until told to go on

One at a time. A fault comes before all of them.
"""

from revivemoe.engine.drains import Drains
from revivemoe.engine.returns import Returns
from revivemoe.engine.traffic import Traffic
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.rank_life import Condemned, Gone, Leaving, Queued
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import RankId
from revivemoe.messages.events import Tell
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.planner import refuse_switch


class Maintenance:
    """Decides when the next planned change is made. Called by nobody below it."""

    def __init__(self, epochs: Epochs, traffic: Traffic, tell: Tell) -> None:
        self._epochs, self._fleet = epochs, epochs.fleet
        self.drains = Drains(epochs, traffic, tell)
        self.returns = Returns(epochs, self.drains, tell)
        self._restore_id: str | None = None
        self._pause: tuple[bool, str | None] = (False, None)

    # ---- asked for ---------------------------------------------------------------------------

    def drain(self, fault: Fault, now: float, request_id: str | None = None) -> None:
        """Take a rank out at a step boundary. Refused (with an event) if nobody could take over."""
        self.drain_all([fault], now, request_id)

    def drain_all(self, faults: list[Fault], now: float, request_id: str | None = None) -> None:
        """Several: none of them takes over from another one."""
        asked = [self.drains.ask(fault, request_id) for fault in faults]
        if any(asked):
            self.tick(now)

    def switch_role(self, rank: RankId, now: float, request_id: str | None) -> None:
        """Make an attention rank an expert rank, beside the others. Raises ValueError."""
        if refusal := refuse_switch(self._epochs.world(now), rank):
            raise ValueError(refusal)
        fault = Fault(rank, "role_switch", "asked by an operator")
        if not self.drains.ask(fault, request_id, switch=True):
            raise ValueError(f"rank {rank} is on its way already: out, or to another role")
        self.tick(now)

    def rejoin(self, rank: RankId, now: float, request_id: str | None) -> None:
        """Start a new process for a rank that is out. Raises ValueError if it is not."""
        view = self._fleet.views.get(rank)
        if view is None:
            raise ValueError(f"id {rank} is not a rank of this instance")
        if view.member:
            raise ValueError(f"rank {rank} is not out: it is a member")
        view.request_id = request_id
        view.vouch()
        self.returns.asked(rank)
        if view.dead:
            self._fleet.lives.replace(rank, now)

    def call_off(self, rank: RankId, now: float) -> bool:
        """A rank that is no member is not to come back. False if it is out for good already."""
        view = self._fleet.views[rank]
        was_out, view.taken_out = view.taken_out, True
        if isinstance(view.life, Gone | Leaving | Condemned):
            self._fleet.lives.call_off_launch(rank, now)
            return not was_out
        queued = isinstance(view.life, Queued)  # nobody is there who could be accused
        if not queued and self._epochs.matters(rank):  # the change under way counts on it
            self._epochs.accuse([Fault(rank, "isolate", "asked by an operator")], now)
        else:
            self._fleet.lives.call_off(view, now)
        return True

    def restore(self, request_id: str | None, now: float) -> None:
        """Load missing experts into spare slots. Raises ValueError if there is nothing to do."""
        self._epochs.loads.restore(self._epochs.membership, now)
        self._restore_id = request_id

    def pause(self, request_id: str | None, now: float) -> None:
        """Stop all ranks at the next step boundary."""
        self._pause = (True, request_id)
        self.tick(now)

    def resume(self, now: float) -> None:
        """End a pause; one that has not begun will not."""
        self._pause = (False, None)
        self._epochs.release(now)

    # ---- what happens ------------------------------------------------------------------------

    def postpone(self, seconds: float) -> None:
        """The engine itself stood still for so long."""
        self.drains.postpone(seconds)

    def tick(self, now: float) -> None:
        """Make the next planned change, if the instance is free for it."""
        epochs = self._epochs
        self.returns.tick(now)
        if not (epochs.loads.loading or epochs.loads.awaits_epoch):
            self._restore_id = None  # what was asked for has come about otherwise, or will not
        if not epochs.quiet:
            return
        wanted, request_id = self._pause
        if wanted:
            self._pause = (False, None)
            epochs.change([], "pause", now, hold=True, request_id=request_id)
        elif joiners := self._fleet.joining:
            self._take_in(joiners, now)
        elif epochs.lost_switch:
            epochs.lost_switch = False
            plan = epochs.plan_for([])
            if isinstance(plan, Continue) and plan.switches:
                epochs.change([], "role_switch", now)
        elif self.drains.tick(now):
            pass
        elif epochs.loads.awaits_epoch:
            epochs.loads.epoch_asked()
            request_id, self._restore_id = self._restore_id, None
            epochs.change([], "restore_experts", now, request_id=request_id)
        else:
            self.returns.see_to_the_rest(now)

    def _take_in(self, joiners: list[RankView], now: float) -> None:
        ids = [view.request_id for view in joiners]
        switched = any(view.rank in self._fleet.switched for view in joiners)
        cause, request_id = "role_switch" if switched else "rejoin", next(filter(None, ids), None)
        self._epochs.change([], cause, now, request_id=request_id)
