"""Runs one seed: builds the instance, lets it run to its end, checks everything on the way."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from revivemoe.engine.engine import Engine
from revivemoe.epochs.state import FailedState
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import place
from revivemoe.messages.events import Event
from revivemoe.sim.client import Client
from revivemoe.sim.clock import Clock
from revivemoe.sim.cluster import SimCluster
from revivemoe.sim.faults import KINDS, FaultKind, FaultSpec
from revivemoe.sim.host import EngineHost, is_settled, stage_of
from revivemoe.sim.scenario import NUM_EXPERTS, Arrival, Scenario, draw
from revivemoe.sim.strikes import Strikes
from revivemoe.sim.verdict import Verdict
from revivemoe.sim.vocabulary import LetterVocabulary
from revivemoe.streams import EngineUnavailable

LIMIT_S = 60.0
"""Virtual time within which all requests must have ended."""
SETTLE_S = 0.3
"""How long to look on after the last request has ended."""

Trace = Callable[[str], None]


@dataclass
class Result:
    seed: int
    violation: str | None = None
    trace: str = ""
    struck: list[tuple[FaultSpec, str]] = field(default_factory=list)
    outcome: str = ""
    virtual_s: float = 0.0
    num_actions: int = 0
    num_steps: int = 0
    preemptions: int = 0


class Simulation:
    def __init__(self, scenario: Scenario, trace: Trace | None = None) -> None:
        self.scenario = scenario
        self.clock, self.rng = Clock(), Random(f"events {scenario.seed}")
        self.host = EngineHost(self.clock, self.rng, self._observe)
        told = (self.host.on_report, self.host.on_arrived, self.host.on_exit)
        self.cluster = SimCluster(self.clock, self.rng, scenario, *told)
        self.strikes = Strikes(self.clock, self.cluster, self.host, scenario.faults)
        topology = scenario.config.topology()
        placement = place(NUM_EXPERTS, [0, 1], topology.experts, scenario.redundant, scenario.spare)
        membership = Membership(topology, placement, scenario.config.dense_groups())
        clock, vocabulary = lambda: self.clock.now, LetterVocabulary()
        self.engine = Engine(
            scenario.config, membership, vocabulary, self.cluster, clock, self._on_event
        )
        self.clients: list[Client] = []
        self.verdict = Verdict(scenario, self.engine, self.cluster, self.strikes)
        self._trace = trace
        self.strikes.trace = self._tell
        self._stage = ""
        self._served = False
        self._over = False

    def run(self) -> None:
        """To the end of the last request, and a little on. Raises AssertionError."""
        self.host.start(self.engine)
        settled_for_s, began_s = 0.0, self.clock.now
        while settled_for_s < SETTLE_S:
            self.clock.step()
            began_s = began_s if self._over and not self.host.stalled else self.clock.now
            settled_for_s = self.clock.now - began_s
            assert self.clock.now < LIMIT_S, self.verdict.stuck(self.clients)
        self.verdict.at_end(self.clients, self.clock.now)

    def _is_over(self) -> bool:
        if isinstance(self.engine.state, FailedState):
            return not self.host.stalled
        return (
            len(self.clients) == len(self.scenario.arrivals)
            and all(client.done for client in self.clients)
            and is_settled(self.engine)
            and not self._unnoticed()
            and not self.strikes.pending
        )

    def _unnoticed(self) -> bool:
        """Whether a member has gone, or stands still, and the engine has yet to find out."""
        members = (self.cluster.processes[r] for r in self.engine.membership.members)
        return any(not process.alive or process.stopped for process in members)

    def _observe(self) -> None:
        """After every call into the engine; its ticks see to it that this is often."""
        self.verdict.check_lives()
        stage = stage_of(self.engine)
        if stage != self._stage:
            self._stage = stage
            self._on_stage(stage)
        self._over = self._is_over()

    def _on_stage(self, stage: str) -> None:
        self.strikes.on_stage(stage)
        if stage == "serving" and not self._served:
            self._served = True
            self.strikes.on_serving()
            for arrival in self.scenario.arrivals:
                self.clock.after(arrival.at_s, partial(self._arrive, arrival))

    def _on_event(self, event: Event) -> None:
        self._tell(str(event))
        self.verdict.on_event(event)

    def _tell(self, line: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.clock.now:9.4f} {line}")

    def _arrive(self, arrival: Arrival) -> None:
        client = Client(arrival)
        self.clients.append(client)
        self.host.call(partial(self._submit, client))
        if arrival.abort_after_s is not None:
            abort = partial(self.host.call, partial(self._abort, client))
            self.clock.after(arrival.abort_after_s, abort)

    def _submit(self, client: Client) -> None:
        try:
            client.request = self.engine.submit(client.submission, client)
        except EngineUnavailable:
            client.refused = True

    def _abort(self, client: Client) -> None:
        if client.request is not None and not client.done:
            client.aborted = True
            self.engine.abort(client.request)


def run_seed(seed: int, kinds: tuple[FaultKind, ...] = KINDS, trace: Trace | None = None) -> Result:
    """Run one seed. What breaks is in `violation`: nothing is raised."""
    result = Result(seed)
    try:
        simulation = Simulation(draw(seed, kinds), trace)
        try:
            simulation.run()
        finally:
            engine, drivers = simulation.engine, simulation.cluster.drivers.values()
            result.struck, result.outcome = simulation.strikes.struck, stage_of(engine)
            result.virtual_s = simulation.clock.now
            result.num_actions = simulation.clock.num_actions
            result.num_steps = engine.signals.last_step
            result.preemptions = sum(driver.rank.stats().preemptions for driver in drivers)
    except Exception as error:
        result.violation = f"{type(error).__name__}: {error}"
        result.trace = traceback.format_exc()
    return result
