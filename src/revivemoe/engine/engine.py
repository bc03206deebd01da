"""Read this first: the engine of one instance. It wires everything and decides nothing alone.

    reports, exits, time --> signals --> epochs (recovery) --> ranks
    submissions -----------> traffic (ledger: token logs, owners) --> ranks, streams
    operators, monitors ---> maintenance (planned changes), devices --> epochs

The engine is synchronous and takes the time as an argument; `serving` drives it with asyncio and
real processes, the simulation and the tests with neither.
"""

from collections.abc import Callable

from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.device_watch import DeviceWatch
from revivemoe.engine.maintenance import Maintenance
from revivemoe.engine.requests import LiveRequest, Sink
from revivemoe.engine.traffic import Traffic
from revivemoe.epochs.epochs import Epochs
from revivemoe.epochs.fleet import Fleet
from revivemoe.epochs.ports import Cluster
from revivemoe.epochs.rank_view import RankView
from revivemoe.epochs.signals import Signals
from revivemoe.epochs.state import FailedState, State
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.membership import Membership
from revivemoe.messages.events import Event, Stalled
from revivemoe.messages.reports import ExpertsLoaded, Heartbeat, Holdings, Report, Tokens
from revivemoe.recovery.faults import DeviceReport
from revivemoe.streams import EngineUnavailable, Submission

TICK_GAP_S = 0.25
"""A longer time between two ticks is a stall of the engine itself, which excuses the ranks."""
OWN_STALL_S = 1.0
"""After one longer than this, nobody is judged before the next tick."""


class Engine:
    """One instance: its epochs, its requests, what is planned for it."""

    def __init__(
        self,
        config: EngineConfig,
        membership: Membership,
        vocabulary: Vocabulary,
        cluster: Cluster,
        clock: Callable[[], float],
        tell: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """`membership`: of the first epoch. `tell`: is given every event."""
        assert config.max_model_len is not None, "the config is resolved beforehand"
        devices = {rank: config.rank_device(rank) for rank in membership.members}
        fleet = Fleet(cluster, membership.placement, devices, config.policy, tell)
        self.config, self.tell = config, tell
        requests = (vocabulary, config.max_model_len, membership, fleet)
        self.traffic = Traffic(*requests, config.policy.trial_timeout_s, clock, tell)
        self.epochs = Epochs(config.policy, membership, fleet, self.traffic, clock, tell)
        self.signals = Signals(self.epochs, config.start_timeout_s, tell)
        self.maintenance = Maintenance(self.epochs, self.traffic, tell)
        self.devices = DeviceWatch(self.epochs, self.maintenance, tell)
        self.last_ft_request_id: str | None = None
        self._last_tick = clock()
        self._spared = False
        """Whether nobody was judged in the last tick."""

    # ---- what others may see -----------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.epochs.state

    @property
    def membership(self) -> Membership:
        return self.epochs.membership

    @property
    def ranks(self) -> dict[RankId, RankView]:
        return self.epochs.fleet.views

    @property
    def degraded(self) -> bool:
        """Whether experts are missing."""
        return bool(self.epochs.membership.missing)

    # ---- life --------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Launch every rank."""
        self.signals.start(now)

    def stop(self) -> None:
        """Ask every living rank to exit."""
        self.epochs.stop()

    def fail(self, reason: str) -> None:
        """An error of the engine's own host: nothing can be relied upon."""
        self.epochs.fail(reason)

    def tick(self, now: float) -> None:
        """Judge deadlines. Called a few times a second, after the inbox has been drained.

        After a long stall of its own the engine judges nobody in this tick, but does in the next;
        after any, it moves the deadlines by what went beyond the usual.
        """
        gap_s, self._last_tick = now - self._last_tick, now
        if gap_s > TICK_GAP_S:
            self.signals.postpone(gap_s - TICK_GAP_S)
            self.maintenance.postpone(gap_s - TICK_GAP_S)
        spared, self._spared = self._spared, gap_s > OWN_STALL_S
        if self._spared:
            self.tell(Stalled(gap_s))
        if (spared or not self._spared) and self.signals.tick(now):
            self._look_after(now)

    def _look_after(self, now: float) -> None:
        """Nobody is accused: what else is due."""
        self.traffic.tick()
        for fault in self.epochs.fleet.newly_slow(now):
            if self.config.policy.isolate_slow:
                self.maintenance.drain(fault, now)
        self.devices.tick(now)
        self.maintenance.tick(now)

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, submission: Submission, sink: Sink) -> LiveRequest:
        """Admit a request. While starting or recovering its sequences wait for a rank.

        Raises EngineUnavailable once the instance has failed.
        """
        if isinstance(self.state, FailedState):
            raise EngineUnavailable(f"the instance has failed: {self.state.reason}")
        return self.traffic.submit(submission, sink)

    def abort(self, request: LiveRequest) -> None:
        """The client is gone."""
        self.traffic.ledger.abort(request)

    # ---- what is seen ------------------------------------------------------------------------

    def on_report(self, report: Report, now: float) -> None:
        """Take one message of a rank's present process; those of the accused are dropped."""
        if not self.signals.heard(report, now):
            return
        if isinstance(report, Tokens):
            self.traffic.on_tokens(report)
            self.signals.committed(report, now)
            self.devices.reached(self.signals.last_step, now)
        elif isinstance(report, Holdings):
            self.traffic.on_holdings(report)
        else:
            self.signals.on_report(report, now)
            if isinstance(report, Heartbeat):
                self.traffic.on_heartbeat(report, now)
            elif isinstance(report, ExpertsLoaded):
                self.maintenance.tick(now)

    def on_arrived(self, rank: RankId, incarnation: Incarnation, pid: int, now: float) -> None:
        """A process of a rank has come into being."""
        self.epochs.fleet.lives.on_arrived(rank, incarnation, pid, now)

    def on_exit(
        self,
        rank: RankId,
        incarnation: Incarnation,
        detail: str,
        now: float,
        *,
        by_itself: bool = False,
    ) -> None:
        """A rank's process is gone. `by_itself`: it crashed; otherwise somebody killed it."""
        self.signals.on_exit(rank, incarnation, detail, now, by_itself)

    def on_health(self, report: DeviceReport, now: float) -> None:
        """A monitor tells of a rank's device; the policy says what that asks for."""
        if not self.epochs.stopping:
            self.devices.on_report(report, now)
