"""What must hold: checked at accusations and at the end of a seed."""

from revivemoe.engine.engine import Engine
from revivemoe.engine.metrics import EngineCollector
from revivemoe.engine.status import status_document
from revivemoe.epochs.rank_life import WITH_PROCESS, Condemned, Gone
from revivemoe.epochs.state import FailedState
from revivemoe.ids import Epoch, RankId
from revivemoe.messages import events
from revivemoe.sim.client import Client
from revivemoe.sim.cluster import SimCluster
from revivemoe.sim.host import stage_of
from revivemoe.sim.process import Process
from revivemoe.sim.scenario import Scenario
from revivemoe.sim.strikes import NODE, Strikes

POISONED = "poison"
"""Id of the request that brings down whoever runs it."""
LIKE_POISON = ("hang", "error", "nan-twice", "load-fails", "exit-late", "exit-never")
"""Faults that a request may have brought about, as far as anybody can see."""
MOST_LOST_BY_POISON = 2
MOST_LOST_BY_CHANCE = 4
"""So many deaths in a row under one request are not believed to be chance."""


class Verdict:
    """Knows what was done to the instance, and so what it may do."""

    def __init__(
        self, scenario: Scenario, engine: Engine, cluster: SimCluster, strikes: Strikes
    ) -> None:
        self._scenario, self._engine = scenario, engine
        self._cluster, self._strikes = cluster, strikes
        self._cut_off: set[RankId] = set()
        """Ends of links that were accused."""
        self._accused: set[Process] = set()
        self._convicted: set[str] = set()
        self._fence_timeouts = 0
        """Ranks that hung while others were being fenced: nothing they ran is suspected."""

    def on_event(self, event: events.Event) -> None:
        """What the engine tells of what it does."""
        match event:
            case events.Accused():
                self._fence_timeouts += event.kind == "fence_timeout"
                self._check_accusation(event)
            case events.DrainBegun():
                self._check_refused(event.id, event.detail)
                going_home = event.kind == "going_home"
                assert going_home or event.id in self._strikes.drained, f"for nothing: {event}"
            case events.Convicted():
                self._check_conviction(event)
            case events.RequestFailed():
                raise AssertionError(f"nothing here may go wrong in that way: {event}")
            case events.HoldingsMended():
                lost = self._cluster.processes[event.id] in self._cluster.mute_steps
                assert lost, f"nothing was lost on its way: {event}"
            case events.ExpertsTaken():
                self._check_load(event)
            case events.StateEntered(state="serving"):
                self._check_met(event.epoch)
            case _:
                pass

    def _check_met(self, epoch: Epoch) -> None:
        """The instance serves only once every member has met all others in the new epoch."""
        for rank in self._engine.membership.members:
            process = self._cluster.processes[rank]
            assert process.met >= epoch, f"rank {rank} has not met the others in epoch {epoch}"

    def _check_accusation(self, event: events.Accused) -> None:
        """Whoever is accused has a fault in this scenario; of a link, one end only."""
        process = self._cluster.processes[event.id]
        self._accused.add(process)
        self._check_refused(event.id, event.detail)
        if process in self._strikes.guilty | self._cluster.never_started | self._cluster.doomed:
            return
        if event.kind in ("device_fault", "isolate") and event.id in self._strikes.drained:
            return
        for ends in self._strikes.links.suspects():
            if process.rank in ends and not ends & self._cut_off:
                self._cut_off.add(process.rank)
                return
        raise AssertionError(
            f"rank {process.rank} is accused of {event.kind} ({event.detail}), but is healthy"
        )

    def _check_refused(self, rank: RankId, detail: str) -> None:
        """Nobody goes for what is said of all at once, or was found to be too much."""
        code = detail.partition(":")[0]
        refused = [one.signal for one in self._engine.devices.signals.refused]
        too_much = code == NODE or any(s.code == code and rank in s.ranks for s in refused)
        assert not too_much, f"rank {rank} goes for {detail!r}, which the instance cannot afford"

    def _check_load(self, event: events.ExpertsTaken) -> None:
        """A rank loads before a resume what the plan has named, and no more: the plan knows what
        the slots hold.
        """
        plan = self._engine.epochs.coordinator.plan
        if plan is None or event.id not in plan.membership.members:
            return
        planned = sum(reload.rank == event.id for reload in plan.reloads)
        loaded = sum(event.sources.values())
        assert loaded <= planned, f"rank {event.id} loads {loaded} experts, {planned} are planned"

    def _check_conviction(self, event: events.Convicted) -> None:
        """Two faults of a rank's own, the second while a request is on trial, cannot be told from
        poison. The first may be the poison's: it ran beside that request.
        """
        innocent = event.request != POISONED
        four_died = len(self._strikes.guilty) >= MOST_LOST_BY_CHANCE
        like_poison = self._num_like_poison() + bool(self._strikes.poisoned)
        assert not innocent or four_died or like_poison > 1, (
            f"an innocent request is convicted: {event}"
        )
        self._convicted.add(event.request)

    def check_lives(self) -> None:
        """No process runs but the one that the engine knows of, in a state that has one."""
        for process in self._cluster.history:
            if not process.alive or not process.arrived:
                continue
            view = self._engine.ranks[process.rank]
            known = view.incarnation == process.incarnation and isinstance(view.life, WITH_PROCESS)
            assert known, (
                f"rank {process.rank}.{process.incarnation} runs, but that rank's process is "
                f"{view.incarnation}: {view.life}"
            )

    def stuck(self, clients: list[Client]) -> str:
        """Why a seed has not come to its end."""
        waiting = [c.submission.request_id for c in clients if not c.done]
        ranks = "; ".join(self._describe(p) for p in self._cluster.processes.values())
        stage = stage_of(self._engine)
        return f"no end in sight: the engine is {stage}, waiting for {waiting}; {ranks}"

    def _describe(self, process: Process) -> str:
        life = "alive" if process.alive else "dead"
        marks = [name for name in ("stopped", "hung") if getattr(process, name)]
        state = type(self._cluster.drivers[process.rank].rank.state).__name__
        doing = type(process.doing).__name__
        return (
            f"rank {process.rank}.{process.incarnation} {' '.join([life, *marks])}, step "
            f"{process.step}, {state}, {doing} {getattr(process.doing, 'phase', '')}"
        )

    def at_end(self, clients: list[Client], now: float) -> None:
        """All requests have ended, or the instance has failed."""
        self._check_documents(now)
        if isinstance(self._engine.state, FailedState):
            self._check_failed(clients, self._engine.state.reason)
            return
        for client in clients:
            self._check_client(client)
        self._check_poison()
        self._check_numbers()
        self._check_placement()
        self._check_dense()
        self._check_ranks()
        self._check_returned()

    def _check_documents(self, now: float) -> None:
        """What an operator reads can be built, and no stall is negative."""
        document = status_document(self._engine, now, now)
        list(EngineCollector(self._engine).collect())
        assert document["epoch"] == self._engine.membership.epoch
        stalls = [record.stall_s for record in self._engine.epochs.records]
        assert all(s is None or s >= 0 for s in stalls), f"stalls of {stalls} s"

    def _check_client(self, client: Client) -> None:
        name = client.submission.request_id
        assert not client.refused, f"{name} was refused"
        if name in self._convicted:
            assert client.failure is not None, f"{name} is convicted and goes on"
        elif name == POISONED:
            assert client.failure is not None, f"{name} got through"
        else:
            assert client.failure is None, f"{name} failed: {client.failure}"

    def _check_poison(self) -> None:
        lost = len(set(self._strikes.poisoned) - self._strikes.hit)
        # A rank killed meanwhile may have left its sequences no rank but one with a trial.
        kills = sum(fault.kind.startswith("kill") for fault, _ in self._strikes.struck)
        most = MOST_LOST_BY_POISON + self._num_like_poison() + self._fence_timeouts + kills
        assert lost <= most, f"the poison request took {lost} ranks"

    def _check_numbers(self) -> None:
        """Somebody whose numbers broke twice, while nothing else went wrong, has been found."""
        broken = self._strikes.broken_twice()
        if broken and {fault.kind for fault, _ in self._strikes.struck} == {"nan-twice"}:
            ranks = [process.rank for process in broken]
            assert self._accused & set(broken), f"the numbers of ranks {ranks} broke twice"

    def _num_like_poison(self) -> int:
        return sum(fault.kind in LIKE_POISON for fault, _ in self._strikes.struck)

    def _check_failed(self, clients: list[Client], reason: str) -> None:
        assert self.excuses(), f"failed without need: {reason}"
        for client in clients:
            name = client.submission.request_id
            assert client.done, f"{name} hangs after the failure"

    def excuses(self) -> list[str]:
        """Facts that make a failure of the whole instance legitimate."""
        policy, kinds = self._scenario.policy, {f.kind for f, _ in self._strikes.struck}
        found = []
        if "restart" not in policy.repair:
            found.append("no restart allowed")
        if kinds & {"corpse", "exit-never"}:
            found.append("some rank cannot be started anew")
        if any(stage == "starting" for _, stage in self._strikes.struck):
            found.append("a fault before the first step")
        lost = self._strikes.guilty | self._cluster.doomed | self._cluster.never_started
        if len(lost) > policy.max_restarts:
            found.append("so many restarts")
        return found

    def _check_placement(self) -> None:
        fraction = self._engine.membership.missing_fraction
        assert fraction <= self._scenario.policy.max_missing_fraction, "too much is masked"

    def _check_dense(self) -> None:
        membership = self._engine.membership
        if membership.dense is not None:
            assert membership.dense.healthy(membership.attention), "no dense group is healthy"

    def _check_returned(self) -> None:
        """Nothing that was condemned lives on, and whoever may come back has done so."""
        stuck = {"corpse", "zombie"} & {fault.kind for fault, _ in self._strikes.struck}
        for view in self._engine.ranks.values():
            alive = self._cluster.processes[view.rank].alive
            assert stuck or not (alive and isinstance(view.life, Condemned)), f"{view} lives on"
            if self._scenario.policy.auto_rejoin and isinstance(view.life, Gone):
                assert not self._engine.maintenance.returns.wants(view), f"{view} is not back"

    def _check_ranks(self) -> None:
        for rank in self._engine.membership.topology.members:
            loop, process = self._cluster.drivers[rank], self._cluster.processes[rank]
            if not process.alive or process in self._strikes.guilty:
                continue
            loop.forward.check()
            assert not loop.rank.queues.live, f"rank {rank} still holds {loop.rank.queues.live}"
            has_attention = rank in self._engine.membership.topology.attention
            assert bool(loop.rank.limits.num_blocks) == has_attention, f"role of rank {rank}"
            assert loop.rank.pool.num_free == loop.rank.limits.num_blocks, "blocks are held"
            refills = loop.rank.stats().survivor_refills
            told_all = process not in self._cluster.mute_steps
            assert not (refills and told_all), f"rank {rank} filled KV again"
