"""Gathers the `World` that a plan is made from: the only place that knows all it depends on."""

from dataclasses import dataclass

from revivemoe.epochs.attempts import Attempts
from revivemoe.epochs.coordinator import Coordinator
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.loads import Loads
from revivemoe.epochs.ports import SequenceOwner
from revivemoe.ids import RankId
from revivemoe.membership.membership import Membership
from revivemoe.membership.topology import Topology
from revivemoe.recovery.world import World


@dataclass(frozen=True)
class Outlook:
    """Reads; changes nothing."""

    home: Topology
    fleet: Fleet
    loads: Loads
    coordinator: Coordinator
    attempts: Attempts

    def world(
        self, present: Membership, host: SequenceOwner, switch: RankId | None, now: float
    ) -> World:
        """As of now. `switch`: the rank whose role the change under way is to change."""
        fleet, attempts, joining = self.fleet, self.attempts, self.fleet.joining
        under_way = self.coordinator.record.epoch if self.coordinator.active else None
        return World(
            membership=present,
            sequences=host.unfinished(),
            maskable=all(view.maskable for view in fleet.views.values()),
            recent_recoveries=attempts.recent(now, self.coordinator.active),
            recent_restarts=attempts.recent_restarts(now, under_way),
            home=fleet.roles(self.home),
            gone=tuple(fleet.gone),
            ready=tuple(view.rank for view in joining),
            tables={view.rank: view.table for view in (*joining, *fleet.switching)},
            launching=tuple(fleet.launching),
            awaited=self._awaited(),
            relaunchable=tuple(fleet.relaunchable(trusted=True)),
            last_resort=tuple(fleet.relaunchable(trusted=False)),
            held=self.coordinator.held,
            loaded=self.loads.loaded,
            loading=self.loads.loading,
            refusing=self.loads.refusing(now),
            domain_failures=attempts.domain_failures,
            trials=host.trials,
            can_load=attempts.can_load(now),
            home_placement=fleet.home,
            switched=dict(fleet.switched),
            switch=switch,
        )

    def _awaited(self) -> frozenset[RankId]:
        """Expert ranks of the start that are being started anew for the change under way."""
        if not self.coordinator.active:
            return frozenset()
        assert self.home.experts, "an instance without expert ranks"
        started = {*self.coordinator.record.restarted} & {*self.fleet.launching}
        return frozenset(started & {*self.home.experts})
