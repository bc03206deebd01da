"""The simulated cluster: starts, reaches and kills rank processes. `engine.Cluster`."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random

from revivemoe.core.rank import Rank
from revivemoe.core.slots import ExpertSlots
from revivemoe.ids import Epoch, Incarnation, LayerId, RankId
from revivemoe.membership.placement import Table
from revivemoe.messages.commands import Command, Configure, DomainSpec
from revivemoe.messages.reports import Report, Tokens
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
ENDLESS_S = 1e6


class SimCluster:
    """Every process there has been, and the channels to and from them."""

    def __init__(
        self,
        clock: Clock,
        rng: Random,
        scenario: Scenario,
        on_report: Callable[[Report], None],
        on_arrived: Callable[[RankId, Incarnation, int], None],
        on_exit: Callable[[RankId, Incarnation, str, bool], None],
    ) -> None:
        self.clock, self.rng = clock, rng
        self.processes: dict[RankId, Process] = {}
        """The last process of each rank."""
        self.history: list[Process] = []
        """All processes there have been."""
        self.drivers: dict[RankId, Driver] = {}
        self.launches_lost = 0
        """So many of the next launches come to nothing: the fork server has ended."""
        self.never_started: set[Process] = set()
        self.on_reach: Callable[[Process, str, int, bool], float] = lambda *where: 1.0
        self.mishaps = Mishaps()
        self.slow_launches = 0
        """So many of the next launches take very long."""
        self.endless_launches = 0
        """So many of the next launches never come to the end of their load."""
        self.late_launches = 0
        """So many of the next launches come into being after they were given up."""
        self.doomed: set[Process] = set()
        """Processes that cannot get ready in time."""
        self.mute_steps: Counter[Process] = Counter()
        """So many of the next `Tokens` of a process are lost on the way."""
        self.exits_late_s: list[float] = []
        """How late the next exits are told of; infinity: never."""
        self._scenario = scenario
        self._on_report, self._tell_arrived, self._tell_exit = on_report, on_arrived, on_exit
        self._commands: dict[RankId, Channel[Command]] = {}
        self._reports: dict[Process, Channel[Report]] = {}
        self._domains: dict[Epoch, tuple[Configure, Domain]] = {}

    # ---- engine.Cluster ----------------------------------------------------------------------

    def launch(self, rank: RankId, incarnation: Incarnation, slots: Table) -> None:
        delay_s = self._scenario.max_delay_s
        reports = Channel(self.clock, self.rng, delay_s, self._on_report)
        process = Process(self, rank, incarnation, lambda report: self._carry(process, report))
        self.processes[rank] = process
        self.history.append(process)
        self._commands[rank] = Channel(self.clock, self.rng, delay_s, process.deliver)
        self._reports[process] = reports
        rows = slots or ((),) * NUM_LAYERS
        held = ExpertSlots({LayerId(layer): row for layer, row in enumerate(rows)})
        core = Rank(rank, incarnation, self._scenario.limits_of(rank), held)
        process.stats = core.stats
        forward = FakeForward(process, core, self.rng, self.mishaps)
        world = (self._load_s(process), self._enter, self.clock.after, self.mishaps)
        driver = Driver(process, core, forward, held, *world)
        self.drivers[rank] = driver
        if self.launches_lost:
            self.launches_lost -= 1
            self._never_start(process)
        else:
            process.start(driver.run(), self._start_s(process))

    def _carry(self, process: Process, report: Report) -> None:
        if isinstance(report, Tokens) and self.mute_steps[process]:
            self.mute_steps[process] -= 1
        else:
            self._reports[process].send(report)

    def _never_start(self, process: Process) -> None:
        self.never_started.add(process)
        process.die("the fork server ended before its process came")

    def end_forkserver(self) -> None:
        """What it was asked for and has not handed over never comes into being, nor does what is
        asked for before there is another one.
        """
        self.launches_lost = self.rng.randint(0, 2)
        for process in self.history:
            if process.alive and not process.arrived:
                self._never_start(process)

    def _start_s(self, process: Process) -> float:
        if self.late_launches > 0:
            self.late_launches -= 1
            self.doomed.add(process)
            return 4 * self._scenario.policy.spawn_timeout_s
        return START_S * (0.5 + self.rng.random())

    def _load_s(self, process: Process) -> float:
        if self.endless_launches > 0:
            self.endless_launches -= 1
            self.doomed.add(process)
            return ENDLESS_S
        slow = self.slow_launches > 0
        self.slow_launches -= slow
        return (SLOW_LOAD_S if slow else LOAD_S) * (0.5 + self.rng.random())

    def send(self, rank: RankId, command: Command) -> None:
        if rank in self._commands:
            self._commands[rank].send(command)

    def kill(self, rank: RankId) -> None:
        process = self.processes.get(rank)
        if process is not None and process.arrived:  # there is no handle on any other
            process.kill()

    def domain(self) -> DomainSpec:
        return DomainSpec("gloo" if self._scenario.eager_errors else "shm")

    # ---- process.Host ------------------------------------------------------------------------

    def on_arrived(self, process: Process) -> None:
        delay_s = self.rng.random() * self._scenario.max_delay_s
        told = partial(self._tell_arrived, process.rank, process.incarnation, 1000 + process.rank)
        self.clock.after(delay_s, told)

    def on_exit(self, process: Process, detail: str) -> None:
        """The exit is noticed on another way than the reports come, and may overtake them."""
        rank, incarnation = process.rank, process.incarnation
        self._reports[process].lose_rest()
        by_itself = not detail.startswith("killed")
        delay_s = self.rng.random() * 2 * self._scenario.max_delay_s
        if self.exits_late_s:
            delay_s = self.exits_late_s.pop()
            by_itself = True  # how it ended is not known by then
        if delay_s == float("inf"):
            return
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
