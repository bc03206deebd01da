"""The ranks of one instance through all their processes: start them, reach them, replace them."""

import logging
from collections.abc import Iterable, Mapping

from revivemoe.epochs.ports import Cluster
from revivemoe.epochs.rank_life import RankView
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.placement import EMPTY, ExpertPlacement
from revivemoe.membership.topology import Topology, switched
from revivemoe.messages.commands import Command, DomainSpec, Wake
from revivemoe.messages.events import Accused, FoundSlow, Launched, RoleSwitched, Tell, Unkillable
from revivemoe.messages.reports import Heartbeat, RankStats, Report
from revivemoe.recovery.detector import Detector
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.policy import Policy
from revivemoe.recovery.role_switch import RoleSwitch
from revivemoe.recovery.slowness import Slowness

log = logging.getLogger("revivemoe.epochs.fleet")

BAD_DEVICE = ("device_fault", "non_finite", "slow", "isolate")
"""Kinds of fault after which a new process is started there only if nothing else helps."""
CORPSE_WAIT_S = 5.0
"""How long a killed process that is to be replaced may take to be gone."""


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
        self.views = {
            rank: RankView(rank, Incarnation(0), device) for rank, device in devices.items()
        }
        self.detector = Detector(policy)
        self.slowness = Slowness(policy)
        self.home = home
        self.switched: dict[RankId, RankId | None] = {}
        """Processes that have become expert ranks, or are about to, and whose place they take."""
        self.wakes = 0
        """Counts the times that ranks were told of work."""
        self._cluster, self._tell = cluster, tell
        self._in_epoch: dict[RankId, Incarnation] = {}
        """The processes that are members of the present epoch."""

    # ---- processes ---------------------------------------------------------------------------

    def launch(self, rank: RankId, now: float) -> None:
        """Start a (new) process for a rank, with the experts it had at the start."""
        view = self.views[rank]
        assert not view.incarnation or self.detector.gone(rank), f"two processes of rank {rank}"
        incarnation = view.relaunch()
        view.table = self.home.slots.get(rank, ())
        self.switched.pop(rank, None)
        self.slowness.forget(rank)
        self.detector.launched(rank, incarnation, now)
        self._cluster.launch(rank, incarnation, view.table)
        if incarnation > 1:
            self._tell(Launched(rank, incarnation))

    def replace(self, rank: RankId, now: float) -> None:
        """Start a new process for a rank that is out, once the present one is gone."""
        view = self.views[rank]
        if self.detector.gone(rank):
            self.launch(rank, now)
        else:
            view.restart_when_gone, view.condemned_at = True, now
            self._cluster.kill(rank)

    def give_up_corpses(self, now: float) -> bool:
        """A process that does not die cannot be replaced: its memory may still be written to.

        Returns whether there was one.
        """
        corpses = [
            v for v in self.views.values() if v.restart_when_gone and not self.replaceable(v, now)
        ]
        for view in corpses:
            view.restart_when_gone = False
            self._tell(Unkillable(view.rank, view.pid))
        return bool(corpses)

    def condemn(self, fault: Fault, now: float) -> None:
        """The rank is out. Whoever calls sees to its process."""
        view = self.views[fault.rank]
        told = (fault.rank, fault.kind, fault.level, fault.detail, fault.detect_s)
        self._tell(Accused(*told))
        log.warning("rank %d: %s: %s", fault.rank, fault.kind, fault.detail)
        view.condemn(fault)
        view.condemned_at = now
        self.slowness.forget(fault.rank)

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
        watched = frozenset(v.rank for v in self.views.values() if v.launched and not v.dead)
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

    def switch(self, switch: RoleSwitch, aside: bool) -> None:
        """The rank's process has been told to become an expert rank: there is no way back. It is
        no member in its old role any more. `aside`: it says when it is ready for the new one.
        """
        view = self.views[switch.rank]
        assert not view.dead, f"rank {switch.rank} is out, and switches its role"
        self.switched[switch.rank] = switch.replaces
        view.table, view.ready, view.draining = switch.table, not aside, False
        view.stats = RankStats()
        self._in_epoch.pop(switch.rank, None)
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

    def enter_epoch(self, members: Iterable[RankId]) -> None:
        """The present processes of these ranks are members from now on."""
        self._in_epoch = {rank: self.views[rank].incarnation for rank in members}

    def is_new(self, view: RankView) -> bool:
        """Whether the rank's present process has no part in the present epoch."""
        return self._in_epoch.get(view.rank) != view.incarnation

    def replaceable(self, view: RankView, now: float) -> bool:
        """Whether its process is gone, or may still be expected to go."""
        return self.detector.gone(view.rank) or now <= view.condemned_at + CORPSE_WAIT_S

    @property
    def joining(self) -> list[RankView]:
        """Ready to be taken in."""
        return [v for v in self.views.values() if v.ready and not v.dead and self.is_new(v)]

    @property
    def switching(self) -> list[RankView]:
        """Loading for the role they are to have."""
        return [v for v in self.views.values() if v.rank in self.switched and v.loading]

    @property
    def launching(self) -> list[RankId]:
        """With a new process under way."""
        return [v.rank for v in self.views.values() if v.restart_when_gone or v.loading]

    @property
    def gone(self) -> list[RankId]:
        """Without the process that was, or would be, in the present epoch."""
        return [v.rank for v in self.views.values() if v.dead or self.is_new(v)]

    def relaunchable(self, now: float) -> list[RankId]:
        """For which a process may be started: on devices that are to be trusted, if there are."""
        dead = [v for v in self.views.values() if v.dead and self.replaceable(v, now)]
        trusted = [v for v in dead if v.fault is None or v.fault.kind not in BAD_DEVICE]
        return [v.rank for v in trusted or dead]

    def incarnation(self, rank: RankId) -> Incarnation:
        return self.views[rank].incarnation
