"""The ranks of one instance through all their processes: start them, reach them, replace them."""

import logging
from collections.abc import Callable, Iterable, Mapping

from revivemoe.epochs.lives import LAUNCH, Lives
from revivemoe.epochs.ports import Cluster
from revivemoe.epochs.rank_life import Condemned, Ready, Switching
from revivemoe.epochs.rank_view import RankView
from revivemoe.ids import Epoch, Incarnation, RankId
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.membership.topology import Topology, switched
from revivemoe.messages.commands import Command, DomainSpec, Wake
from revivemoe.messages.events import Accused, FoundSlow, RoleSwitched, Tell
from revivemoe.messages.reports import Heartbeat, RankStats, Report
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.role_switch import RoleSwitch
from revivemoe.recovery.slowness import Slowness

log = logging.getLogger("revivemoe.epochs.fleet")

DEVICE_IS_BAD = ("non_finite", "slow", "isolate")
"""Kinds of fault after which a new process is started there only if nothing else helps. What
monitors say of a device is known besides, and outlives the process."""


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
        self.lives = Lives(cluster, self.views, policy, tell)
        self.lives.on_launch = self._renew
        self.home = home
        self.switched: dict[RankId, RankId | None] = {}
        """Processes that have become expert ranks, or are about to, and whose place they take."""
        self.wakes = 0
        """Counts the times that ranks were told of work."""
        self.on_launch: Callable[[RankId], None] = lambda rank: None
        """A new process of a rank is asked for."""
        self._cluster, self._tell = cluster, tell

    # ---- processes ---------------------------------------------------------------------------

    def condemn(self, fault: Fault, now: float) -> None:
        """The rank is out, and its process is killed."""
        view = self.views[fault.rank]
        told = (fault.rank, fault.kind, fault.level, fault.detail, fault.detect_s)
        self._tell(Accused(*told))
        log.warning("rank %d: %s: %s", fault.rank, fault.kind, fault.detail)
        view.fault = fault
        self.end(view, now)

    def end(self, view: RankView, now: float) -> None:
        """It is out without a fault of its own, and told nothing any more."""
        self.lives.end(view, now)
        self.slowness.forget(view.rank)

    def postpone(self, seconds: float) -> None:
        """The host itself stood still for so long: nobody else is late by that."""
        self.detector.postpone(seconds)
        self.lives.postpone(seconds)

    def _renew(self, view: RankView, now: float) -> None:
        """A new process is on its way, with the experts and the role of the start. What was known
        of the last one is over.
        """
        view.table = self.home.slots.get(view.rank, ())
        self.switched.pop(view.rank, None)
        self.slowness.forget(view.rank)
        self.detector.launched(view.rank, view.incarnation, now)
        self.on_launch(view.rank)

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

    # ---- what they tell ----------------------------------------------------------------------

    def heard(self, report: Report, now: float) -> bool:
        """A message has come. Whether it is of a present process that is not accused."""
        view = self.views.get(report.rank)
        if view is None or report.incarnation != view.incarnation or view.dead:
            return False
        self.detector.heard(report.rank, report.incarnation, now)
        return True

    def on_heartbeat(self, beat: Heartbeat) -> int:
        """Returns how many graphs the rank has compiled since the last one."""
        view, recompiled = self.views[beat.rank], 0
        self.detector.beat(beat)
        if view.ready:
            recompiled = max(0, beat.stats.recompiled - view.stats.recompiled)
            view.stats = beat.stats
        if beat.pace is not None:
            self.slowness.heard(beat.rank, beat.pace)
        return recompiled

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

    def switch(self, switch: RoleSwitch, aside: bool, request_id: str | None, now: float) -> None:
        """The rank's process has been told to become an expert rank: there is no way back. It is
        no member in its old role any more. `aside`: it says when it is ready for the new one.
        `request_id`: of whoever has asked for it.
        """
        view = self.views[switch.rank]
        self.lives.switch(view, aside, now)
        view.request_id = request_id
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
            self.lives.take_in(self.views[rank], epoch, now)

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
        owed = self.lives.obligations.owed
        return [v.rank for v in self.views.values() if v.loading or owed(LAUNCH, v.rank)]

    @property
    def gone(self) -> list[RankId]:
        """Without the process that was, or would be, in the present epoch."""
        return [v.rank for v in self.views.values() if not v.member]

    def relaunchable(self, trusted: bool) -> list[RankId]:
        """For which a process may be started, on devices that are to be trusted, or are not."""
        dead = (v for v in self.views.values() if self.replaceable(v))
        return [v.rank for v in dead if self.trusted(v) == trusted]

    @staticmethod
    def trusted(view: RankView) -> bool:
        """Whether a new process may do better on its device than the last one."""
        if view.taken_out or view.device_faults:
            return False
        return view.fault is None or view.fault.kind not in DEVICE_IS_BAD

    def incarnation(self, rank: RankId) -> Incarnation:
        return self.views[rank].incarnation
