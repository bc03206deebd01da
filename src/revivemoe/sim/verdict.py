"""What must hold: checked at accusations and at the end of a seed."""

from typing import Any

from revivemoe.engine import Engine, FailedState, Serving
from revivemoe.ids import RankId
from revivemoe.placement import missing_fraction
from revivemoe.sim.client import Client
from revivemoe.sim.cluster import SimCluster
from revivemoe.sim.scenario import Scenario
from revivemoe.sim.strikes import Strikes


class Verdict:
    """Knows what was done to the instance, and so what it may do."""

    def __init__(
        self, scenario: Scenario, engine: Engine, cluster: SimCluster, strikes: Strikes
    ) -> None:
        self._scenario, self._engine = scenario, engine
        self._cluster, self._strikes = cluster, strikes

    def on_accusation(self, event: dict[str, Any]) -> None:
        """Whoever is accused has a fault in this scenario."""
        process = self._cluster.processes[RankId(event["id"])]
        assert process in self._strikes.guilty, (
            f"rank {process.rank} is accused of {event['kind']} ({event['detail']}), but is healthy"
        )

    def stuck(self, clients: list[Client]) -> str:
        """Why a seed has not come to its end."""
        waiting = [c.submission.request_id for c in clients if not c.done]
        ranks = "; ".join(
            f"rank {p.rank}: {'alive' if p.alive else 'dead'}"
            f"{' stopped' if p.stopped else ''}{' hung' if p.hung else ''}, {p.doing}, "
            f"{self._cluster.loops[p.rank].rank.state}"
            for p in self._cluster.processes.values()
        )
        return (
            f"no end in sight: engine {self._engine.state} {self._engine.coordinator.state}, "
            f"waiting for {waiting}; {ranks}"
        )

    def at_end(self, clients: list[Client]) -> None:
        """All requests have ended, or the instance has failed."""
        if isinstance(self._engine.state, FailedState):
            self._check_failed(clients, self._engine.state.reason)
            return
        for client in clients:
            name = client.submission.request_id
            assert client.failure is None, f"{name} failed: {client.failure}"
            assert not client.refused, f"{name} was refused"
        self._check_placement()
        self._check_ranks()

    def _check_failed(self, clients: list[Client], reason: str) -> None:
        assert self.excuses(), f"failed without need: {reason}"
        for client in clients:
            assert client.done, f"{client.submission.request_id} hangs after the failure"

    def excuses(self) -> list[str]:
        """Facts that make a failure of the whole instance legitimate."""
        lost = frozenset(p.rank for p in self._strikes.guilty)
        left = [r for r in self._engine.ranks if r not in lost]
        if not left:
            return ["no rank is left"]
        fraction = missing_fraction(self._engine.placement.without(lost))
        if fraction > self._scenario.policy.max_missing_fraction:
            return ["experts are missing"]
        return []

    def _check_placement(self) -> None:
        engine = self._engine
        assert set(engine.missing) == set(engine.placement.missing()), "experts not listed"
        assert set(engine.placement.slots) <= set(engine.topology.members)
        fraction = missing_fraction(engine.placement)
        assert fraction <= self._scenario.policy.max_missing_fraction, "too much is masked"

    def _check_ranks(self) -> None:
        assert isinstance(self._engine.state, Serving)
        for rank in self._engine.topology.members:
            loop, process = self._cluster.loops[rank], self._cluster.processes[rank]
            if not process.alive or process in self._strikes.guilty:
                continue
            loop.forward.check()
            assert not loop.rank.queues.live, f"rank {rank} still holds {loop.rank.queues.live}"
            assert loop.rank.pool.num_free == loop.rank.limits.num_blocks, "blocks are held"
            assert loop.rank.stats().survivor_refills == 0, f"rank {rank} filled KV again"
