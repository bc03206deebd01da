"""The ranks of one instance through all their processes: start them, reach them, replace them."""

import logging
from collections.abc import Callable, Iterable, Mapping
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
    Ready,
    Switching,
    deadline,
    later,
    transition,
)
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.membership.topology import Topology, switched
from revivemoe.messages.commands import Command, DomainSpec, Wake
from revivemoe.messages.events import (
    Accused,
    FoundSlow,
    Launched,
    LifeChanged,
    RoleSwitched,
    Tell,
    Unkillable,
)
from revivemoe.messages.reports import Heartbeat, RankStats, Report
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.role_switch import RoleSwitch
from revivemoe.recovery.slowness import Slowness

log = logging.getLogger("revivemoe.epochs.fleet")

BAD_DEVICE = ("device_fault", "non_finite", "slow", "isolate")
"""Kinds of fault after which a new process is started there only if nothing else helps."""
LAUNCH = "launch"
"""An obligation: a new process as soon as the present one is gone."""


class Fleet:
    """Every rank's view, and what its process tells of itself."""

    def __init__(
        self,
        cluster: Cluster,
        home: ExpertPlacement,
        devices: Mapping[RankId, str],
        policy: Policy,
        tell: Tell,
    ) -> None:
        """`home`: the experts each rank's process is started with. `devices`: of all ranks."""
        self.views = {rank: RankView(rank, device) for rank, device in devices.items()}
        self.detector = Detector(policy)
        self.slowness = Slowness(policy)
        self.obligations = Obligations()
        self.home = home
        self.switched: dict[RankId, RankId | None] = {}
        """Processes that have become expert ranks, or are about to, and whose place they take."""
        self.wakes = 0
        """Counts the times that ranks were told of work."""
        self.on_late: Callable[[Fault, float], None] = lambda fault, now: None
        """A process has missed a deadline of its life: it is to be accused."""
        self.on_launch: Callable[[RankId], None] = lambda rank: None
        """A new process of a rank is asked for."""
        self.on_unkillable: Callable[[float], None] = lambda now: None
        """Nobody waits any longer for a process to be gone: plans may depend on it."""
        self._cluster, self._policy, self._tell = cluster, policy, tell

    # ---- processes ---------------------------------------------------------------------------

    def launch(self, rank: RankId, now: float) -> None:
        """Start a (new) process for a rank, with the experts it had at the start."""
        view = self.views[rank]
        spawning = self._move(view, life.Spawn(now + self._policy.spawn_timeout_s), now)
        assert spawning, f"two processes of rank {rank}: {view.life}"
        incarnation = view.renew()
        view.table = self.home.slots.get(rank, ())
        self.switched.pop(rank, None)
        self.slowness.forget(rank)
        self.detector.launched(rank, incarnation, now)
        self.on_launch(rank)
        self._cluster.launch(rank, incarnation, view.table)
        if incarnation > 1:
            self._tell(Launched(rank, incarnation))

    def queue(self, rank: RankId, at: float, now: float) -> None:
        """Start a new process for a rank without one, later."""
        self._move(self.views[rank], life.Queue(at), now)

    def replace(self, rank: RankId, now: float) -> None:
        """Start a new process for a rank that is out, once the present one is gone."""
        view = self.views[rank]
        assert view.dead, f"rank {rank} is replaced, and not out: {view.life}"
        if isinstance(view.life, Gone | Queued):
            self.launch(rank, now)
            return
        patience_s = self._policy.corpse_timeout_s
        then = "no new process is started, and the plan is made without one"
        lapse = partial(self._give_up_waiting, rank)
        self.obligations.owe(Obligation(LAUNCH, rank, now, now + patience_s, then, lapse))
        self._doom(view, now)

    def condemn(self, fault: Fault, now: float) -> None:
        """The rank is out. Whoever calls sees to its process."""
        view = self.views[fault.rank]
        told = (fault.rank, fault.kind, fault.level, fault.detail, fault.detect_s)
        self._tell(Accused(*told))
        log.warning("rank %d: %s: %s", fault.rank, fault.kind, fault.detail)
        view.fault = fault
        self.end(view, now)

    def end(self, view: RankView, now: float) -> None:
        """It is out, and told nothing any more: it is killed."""
        if not isinstance(view.life, Condemned):
            self._doom(view, now)
        self.slowness.forget(view.rank)

    def dismiss(self, view: RankView, now: float) -> None:
        """It has been told to stop: its exit is no fault."""
        self._move(view, life.Dismissed(now + self._policy.leave_timeout_s), now)

    def _doom(self, view: RankView, now: float, late: bool = False) -> None:
        """Condemned, for the first time or once more; and killed, if it is there by now."""
        if self._move(view, life.Accused(now + self._policy.corpse_timeout_s, late), now):
            self._cluster.kill(view.rank)

    def _give_up_waiting(self, rank: RankId, now: float) -> None:
        """A process that does not die cannot be replaced: its memory may still be written to."""
        self._doom(self.views[rank], now, late=True)
        self._tell(Unkillable(rank, self.views[rank].pid))
        self.on_unkillable(now)

    # ---- what becomes of them ----------------------------------------------------------------

    def on_arrived(self, rank: RankId, incarnation: Incarnation, pid: int, now: float) -> None:
        """The process has come into being: for one that is condemned, that is the end."""
        view = self.views[rank]
        if incarnation != view.incarnation:
            return
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

    def close(self, now: float) -> None:
        """The end: nothing is launched any more, and what is left is killed."""
        for view in self.views.values():
            self.obligations.met(LAUNCH, view.rank)
            self.end(view, now)

    def drain(self, view: RankView, on: bool, now: float) -> None:
        """Nothing new goes there; or, not `on`, again."""
        self._move(view, life.Drain(on), now)

    def _move(self, view: RankView, event: Event, now: float) -> bool:
        """Let the event happen to the rank's life. False if it is refused."""
        after = transition(view.life, event, now)
        if after is None:
            return False
        was, name, until = type(view.life).__name__, type(after).__name__, deadline(after)
        self.obligations.met(was, view.rank)
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
        self.detector.postpone(seconds)
        self.obligations.postpone(seconds)
        for view in self.views.values():
            view.life = later(view.life, seconds)

    def send(self, rank: RankId, command: Command) -> None:
        self._cluster.send(rank, command)

    def broadcast(self, ranks: Iterable[RankId], command: Command) -> None:
        """The same to all of them: it is encoded once."""
        for rank in ranks:
            self._cluster.send(rank, command)

    def wake(self, members: Iterable[RankId]) -> None:
        """Tell all members that there is work."""
        self.wakes += 1
        self.broadcast(members, Wake(self.wakes))

    def domain(self) -> DomainSpec:
        """How the members of the next epoch shall reach each other."""
        return self._cluster.domain()

    def kill(self, rank: RankId) -> None:
        self._cluster.kill(rank)

    # ---- what they tell ----------------------------------------------------------------------

    def heard(self, report: Report, now: float) -> bool:
        """A message has come. Whether it is of a present process that is not accused."""
        view = self.views.get(report.rank)
        if view is None or report.incarnation != view.incarnation or view.dead:
            return False
        self.detector.heard(report.rank, report.incarnation, now)
        return True

    def on_heartbeat(self, beat: Heartbeat) -> None:
        view = self.views[beat.rank]
        self.detector.beat(beat)
        if view.ready:
            view.stats = beat.stats
        if beat.pace is not None:
            self.slowness.heard(beat.rank, beat.pace)

    def judge(self, now: float) -> list[Fault]:
        """Accusations among the ranks with a process."""
        watched = frozenset(v.rank for v in self.views.values() if not v.dead)
        return self.detector.judge(watched, now)

    def newly_slow(self, now: float) -> list[Fault]:
        """Ranks that have become slow; those that still are, or no longer, are only noted."""
        slow, found = self.slowness.judge(now), []
        for view in self.views.values():
            ratio = None if view.dead else slow.get(view.rank)
            if ratio is not None and view.slow is None:
                detail = f"its own work takes {ratio:.1f} times what it takes its peers"
                self._tell(FoundSlow(view.rank, ratio, detail))
                found.append(Fault(view.rank, "slow", detail, level=4))
            view.slow = ratio
        return found

    def switch(self, switch: RoleSwitch, aside: bool, now: float) -> None:
        """The rank's process has been told to become an expert rank: there is no way back. It is
        no member in its old role any more. `aside`: it says when it is ready for the new one.
        """
        view = self.views[switch.rank]
        patience_s = self._policy.restart_timeout_s if aside else self._policy.join_timeout_s
        switches = self._move(view, life.Switch(now + patience_s, aside), now)
        assert switches, f"rank {switch.rank} switches its role: {view.life}"
        self.switched[switch.rank] = switch.replaces
        view.table, view.stats = switch.table, RankStats()
        self._tell(RoleSwitched(switch.rank, switch.replaces, aside))

    def forget_table(self, rank: RankId) -> None:
        """A rank that has switched roles could not load what it was to hold."""
        view = self.views[rank]
        view.table = tuple((EMPTY,) * len(row) for row in view.table)

    def roles(self, home: Topology) -> Topology:
        """`home`, with the roles that the present processes have."""
        for rank, replaced in self.switched.items():
            home = switched(home, rank, replaced)
        return home

    # ---- who is there ------------------------------------------------------------------------

    def enter_epoch(self, epoch: Epoch, members: Iterable[RankId], now: float) -> None:
        """The present processes of these ranks are members from now on."""
        for rank in members:
            taken = self._move(self.views[rank], life.TakenIn(epoch), now)
            assert taken, f"rank {rank} is no member: {self.views[rank].life}"

    def replaceable(self, view: RankView) -> bool:
        """Whether its process is gone, or may still be expected to go."""
        return view.dead and not (isinstance(view.life, Condemned) and view.life.overdue)

    @property
    def joining(self) -> list[RankView]:
        """Ready to be taken in."""
        return [v for v in self.views.values() if isinstance(v.life, Ready)]

    @property
    def switching(self) -> list[RankView]:
        """Loading for the role they are to have."""
        return [v for v in self.views.values() if isinstance(v.life, Switching)]

    @property
    def launching(self) -> list[RankId]:
        """With a new process under way."""
        owed = self.obligations.owed
        return [v.rank for v in self.views.values() if v.loading or owed(LAUNCH, v.rank)]

    @property
    def gone(self) -> list[RankId]:
        """Without the process that was, or would be, in the present epoch."""
        return [v.rank for v in self.views.values() if not v.member]

    @property
    def relaunchable(self) -> list[RankId]:
        """For which a process may be started: on devices that are to be trusted, if there are."""
        dead = [v for v in self.views.values() if self.replaceable(v)]
        trusted = [v for v in dead if self.trusted(v)]
        return [v.rank for v in trusted or dead]

    @staticmethod
    def trusted(view: RankView) -> bool:
        """Whether a new process may do better on its device than the last one."""
        return view.fault is None or view.fault.kind not in BAD_DEVICE

    def incarnation(self, rank: RankId) -> Incarnation:
        return self.views[rank].incarnation
