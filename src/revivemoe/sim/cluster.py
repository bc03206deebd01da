"""The simulated cluster: starts, reaches and kills rank processes. `engine.Cluster`."""

from collections.abc import Callable
from functools import partial
from random import Random

from revivemoe.core.rank import Rank
from revivemoe.core.slots import ExpertSlots
from revivemoe.ids import Epoch, Incarnation, LayerId, RankId
from revivemoe.membership.placement import Table
from revivemoe.messages.commands import Command, Configure, DomainSpec
from revivemoe.messages.reports import Report
from revivemoe.sim.channel import Channel
from revivemoe.sim.clock import Clock
from revivemoe.sim.domain import Domain
from revivemoe.sim.driver import Driver
from revivemoe.sim.forward import NUM_LAYERS, FakeForward
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.process import Process
from revivemoe.sim.scenario import Scenario

START_S = 0.02
LOAD_S = 0.1
SLOW_LOAD_S = 4.0


class SimCluster:
    """Every process there has been, and the channels to and from them."""

    def __init__(
        self,
        clock: Clock,
        rng: Random,
        scenario: Scenario,
        on_report: Callable[[Report], None],
        on_exit: Callable[[RankId, Incarnation, str, bool], None],
    ) -> None:
        self.clock, self.rng = clock, rng
        self.processes: dict[RankId, Process] = {}
        """The last process of each rank."""
        self.history: list[Process] = []
        """All processes there have been."""
        self.drivers: dict[RankId, Driver] = {}
        self.forkserver_alive = True
        self.never_started: set[Process] = set()
        self.on_reach: Callable[[Process, str, int, bool], float] = lambda *where: 1.0
        self.mishaps = Mishaps()
        self.slow_launches = 0
        """So many of the next launches take very long."""
        self._scenario = scenario
        self._on_report, self._tell_exit = on_report, on_exit
        self._commands: dict[RankId, Channel[Command]] = {}
        self._reports: dict[Process, Channel[Report]] = {}
        self._domains: dict[Epoch, tuple[Configure, Domain]] = {}

    # ---- engine.Cluster ----------------------------------------------------------------------

    def launch(self, rank: RankId, incarnation: Incarnation, slots: Table) -> None:
        delay_s = self._scenario.max_delay_s
        reports = Channel(self.clock, self.rng, delay_s, self._on_report)
        process = Process(self, rank, incarnation, reports.send)
        self.processes[rank] = process
        self.history.append(process)
        self._commands[rank] = Channel(self.clock, self.rng, delay_s, process.deliver)
        self._reports[process] = reports
        rows = slots or ((),) * NUM_LAYERS
        held = ExpertSlots({LayerId(layer): row for layer, row in enumerate(rows)})
        core = Rank(rank, incarnation, self._scenario.limits_of(rank), held)
        process.stats = core.stats
        forward = FakeForward(process, core, self.rng, self.mishaps)
        world = (self._load_s(), self._enter, self.clock.after, self.mishaps)
        driver = Driver(process, core, forward, held, *world)
        self.drivers[rank] = driver
        if self.forkserver_alive:
            process.start(driver.run(), START_S * (0.5 + self.rng.random()))
        else:
            self.never_started.add(process)
            process.die("the fork server is gone")

    def _load_s(self) -> float:
        slow = self.slow_launches > 0
        self.slow_launches -= slow
        return (SLOW_LOAD_S if slow else LOAD_S) * (0.5 + self.rng.random())

    def send(self, rank: RankId, command: Command) -> None:
        if rank in self._commands:
            self._commands[rank].send(command)

    def kill(self, rank: RankId) -> None:
        process = self.processes.get(rank)
        if process is not None:
            process.kill()

    def domain(self) -> DomainSpec:
        return DomainSpec("gloo" if self._scenario.eager_errors else "shm")

    # ---- process.Host ------------------------------------------------------------------------

    def on_exit(self, process: Process, detail: str) -> None:
        """The exit is noticed on another way than the reports come, and may overtake them."""
        rank, incarnation = process.rank, process.incarnation
        self._reports[process].lose_rest()
        by_itself = not detail.startswith("killed")
        delay_s = self.rng.random() * 2 * self._scenario.max_delay_s
        self.clock.after(delay_s, partial(self._tell_exit, rank, incarnation, detail, by_itself))

    def reach(self, process: Process, phase: str, layer: int, meets: bool) -> float:
        return self.on_reach(process, phase, layer, meets)

    # ---- for the step loops ------------------------------------------------------------------

    def _enter(self, configure: Configure, process: Process) -> Domain:
        """The domain of an epoch; all members must have been told the same of it."""
        epoch = configure.epoch
        if epoch not in self._domains:
            members = configure.membership.members
            domain = Domain(epoch, members, self._scenario.eager_errors)
            self._domains[epoch] = (configure, domain)
        known, domain = self._domains[epoch]
        assert known == configure, f"members of epoch {epoch} were told different things"
        self._assert_holds(configure, process)
        return domain

    def _assert_holds(self, configure: Configure, process: Process) -> None:
        held = self.drivers[process.rank].slots.table
        for layer, row in enumerate(configure.membership.table_of(process.rank)):
            for slot, expert in enumerate(row):
                assert expert < 0 or held[layer][slot] == expert, (
                    f"rank {process.rank} enters epoch {configure.epoch} without expert {expert}"
                )
