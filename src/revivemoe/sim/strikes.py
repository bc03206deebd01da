"""Makes the faults of a scenario happen at their moments, and remembers what was done to whom."""

from collections import Counter
from collections.abc import Callable
from functools import partial

from revivemoe.core.step import Batch
from revivemoe.ids import Epoch, RankId
from revivemoe.messages.reports import Fatal
from revivemoe.recovery.faults import DeviceReport
from revivemoe.sim.answers import POISON
from revivemoe.sim.clock import Clock
from revivemoe.sim.cluster import SimCluster
from revivemoe.sim.faults import POISONS, AtTime, FaultSpec, InStage
from revivemoe.sim.host import EngineHost, stage_of
from revivemoe.sim.links import Links
from revivemoe.sim.mishaps import Mishaps
from revivemoe.sim.outside import Outside
from revivemoe.sim.process import Process

SLOWNESS = 5.0
BETWEEN_KILLS_S = 0.25
NUM_RETRIES = 6
BETWEEN_RETRIES_S = 0.08
RETRY_S = 0.3
MOST_RETRIES = 10
NODE = "node"
"""The code of what is said of all ranks at once: nothing may come of it."""

Struck = list[tuple[FaultSpec, str]]


class Strikes(Mishaps):
    """The faults still to come, and what those that came make excusable."""

    def __init__(
        self, clock: Clock, cluster: SimCluster, host: EngineHost, faults: tuple[FaultSpec, ...]
    ) -> None:
        self.struck: Struck = []
        """Each fault with the stage it struck in."""
        self.guilty: set[Process] = set()
        """What the engine may accuse."""
        self.drained: set[RankId] = set()
        """What it may take out as planned."""
        self.poisoned: list[Process] = []
        """What the poison request has brought down."""
        self.hit: set[Process] = set()
        """What another fault was aimed at."""
        self.links = Links(cluster.rng)
        self.trace: Callable[[str], None] = lambda line: None
        self._clock, self._cluster, self._host = clock, cluster, host
        self._outside = Outside(clock, host)
        self._waiting = [f for f in faults if not isinstance(f.when, AtTime)]
        self._timed = [f for f in faults if isinstance(f.when, AtTime)]
        self._poison = next((f for f in faults if f.kind in POISONS), None)
        self._under_way = 0
        self._slow: set[Process] = set()
        self._nan: Counter[Process] = Counter()
        self._nan_done: Counter[Process] = Counter()
        self._nan_at: dict[Process, tuple[Epoch, int]] = {}
        """The step in which it was last: a rank's numbers break once in a step."""
        self._load_failures = self._silent_loads = 0
        cluster.on_reach, cluster.mishaps = self.reach, self

    @property
    def pending(self) -> bool:
        """Some fault has begun to happen, and goes on."""
        return self._under_way > 0

    def on_serving(self) -> None:
        """The instance serves for the first time: faults at a time count from here."""
        for fault in self._timed:
            assert isinstance(fault.when, AtTime)
            self._later(fault.when.seconds, partial(self._strike, fault))
        self._timed = []

    def on_stage(self, stage: str) -> None:
        """The engine has entered a stage: the first fault that waits for it strikes soon."""
        for fault in self._waiting:
            if isinstance(fault.when, InStage) and fault.when.stage == stage:
                self._waiting.remove(fault)
                self._later(fault.when.delay_s, partial(self._strike, fault))
                return

    def reach(self, process: Process, phase: str, layer: int, meets: bool) -> float:
        """A step loop is at this place: strike what waits for it. Returns its slowness."""
        for fault in self._waiting:
            if fault.is_at(process.rank, process.step, phase, layer):
                self._waiting.remove(fault)
                self._strike(fault)
                break
        if meets and self.links.failed(process):
            process.fail_wait("connection reset by peer")
        return SLOWNESS if process in self._slow else 1.0

    # ---- Mishaps -----------------------------------------------------------------------------

    def load_fails(self, process: Process) -> bool:
        if not self._load_failures:
            return False
        self._load_failures -= 1
        self.guilty.add(process)
        return True

    def load_is_silent(self, process: Process) -> bool:
        if not self._silent_loads:
            return False
        self._silent_loads -= 1
        return True

    def corrupts(self, process: Process, phase: str) -> bool:
        at = (process.met, process.step)
        if not self._nan[process] or self._nan_at.get(process) == at:
            return False
        if self._cluster.rng.random() < 0.3:
            return False
        self._nan_at[process] = at
        self._nan[process] -= 1
        self._nan_done[process] += 1
        if self._nan_done[process] > 1:
            self.guilty.add(process)
        return True

    def broken_twice(self) -> list[Process]:
        """Processes that have turned finite numbers into NaN, and did so again."""
        return [process for process, times in self._nan_done.items() if times > 1]

    def runs(self, process: Process, batch: Batch) -> None:
        if self._poison is None or not any(
            POISON in item.sequence.prompt_ids for item in batch.items
        ):
            return
        self.poisoned.append(process)
        if self._poison.kind == "poison":
            self._fail(process)
        else:
            self._hang(process)

    # ---- striking ----------------------------------------------------------------------------

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._under_way += 1
        self._clock.after(delay_s, partial(self._end_later, action))

    def _end_later(self, action: Callable[[], None]) -> None:
        self._under_way -= 1
        action()

    def _strike(self, fault: FaultSpec) -> None:
        self.struck.append((fault, stage_of(self._host.engine)))
        self.trace(f"strike {fault}")
        process = self._cluster.processes[RankId(fault.rank)]
        other = self._cluster.processes[RankId(fault.peer)]
        self.hit |= set() if fault.kind in POISONS else {process, other}
        if not self._strike_one(fault, process) and not self._ask(fault):
            self._strike_more(fault, process, other)

    def _strike_one(self, fault: FaultSpec, process: Process) -> bool:
        """Faults of one process. False if it is none of those."""
        match fault.kind:
            case "kill":
                self._kill(process)
            case "exit-late" | "exit-never":
                late_s = fault.seconds if fault.kind == "exit-late" else float("inf")
                self._cluster.exits_late_s.append(late_s)
                self._kill(process)
            case "lost-tokens":
                self._cluster.mute_steps[process] += 1
            case "deaf":
                process.deaf = True
                self.drained.add(process.rank)
                self._outside.instruct("isolate", {"id": process.rank})
            case "kill-switching":
                switching = self._host.engine.epochs.fleet.switching
                self._kill(self._cluster.processes[switching[0].rank] if switching else process)
            case "error":
                self._fail(process)
            case "stop" | "corpse" | "zombie":
                self._stop(process, fault)
            case "hang":
                self._hang(process)
            case "slow":
                self._slow.add(process)
                self.drained.add(process.rank)
            case "nan":
                self._nan[process] += 1
            case "nan-twice":
                self._nan[process] += 2
            case _:
                return False
        return True

    def _strike_more(self, fault: FaultSpec, process: Process, other: Process) -> None:
        """Faults of several processes, or of something else."""
        match fault.kind:
            case "kill-two":
                self._kill(process)
                self._kill(other)
            case "kill-all":
                for each in list(self._cluster.processes.values()):
                    self._kill(each)
            case "kill-down":
                self._kill_down()
            case "link" | "link-twice":
                times = 1 if fault.kind == "link" else 2
                self.links.cut(process.rank, other.rank, times)
            case "load-fails":
                self._load_failures += 1
            case "launch-slow":
                self._cluster.slow_launches += 1
                self._kill(process)
            case "load-silent":
                self._silent_loads += 1
            case "load-endless":
                self._cluster.endless_launches += 1
                self._kill(process)
            case "launch-late":
                self._cluster.late_launches += 1
                self._kill(process)
            case "late-ticks":
                self._host.tick_late(fault.seconds)
                self._later(fault.seconds, lambda: None)
            case "stall":
                self._host.stall(fault.seconds)
                self._later(fault.seconds, lambda: None)
            case "forkserver":
                self._host.call(self._host.engine.signals.on_forkserver_gone)
                self._cluster.end_forkserver()
            case _:
                assert fault.kind in POISONS, fault.kind

    def _kill(self, process: Process) -> None:
        self.hit.add(process)
        self.guilty.add(process)
        process.kill()

    def _kill_down(self) -> None:
        living = [p for p in self._cluster.processes.values() if p.alive and p.incarnation == 1]
        living = [p for p in living if not p.unkillable]
        if len(living) > 1:
            self._kill(living[0])
            self._later(BETWEEN_KILLS_S, self._kill_down)

    def _fail(self, process: Process) -> None:
        self.guilty.add(process)
        process.report(Fatal(process.rank, process.incarnation, "RuntimeError: device lost"))
        process.die("exited with status 1")

    def _hang(self, process: Process) -> None:
        self.guilty.add(process)
        process.hung = True

    def _stop(self, process: Process, fault: FaultSpec) -> None:
        self.guilty.add(process)
        self.drained.add(process.rank)  # One long pause looks like slowness, too.
        process.unkillable = fault.kind != "stop"
        process.stop()
        if fault.kind == "zombie":
            self._later(fault.seconds, partial(self._go_on, process))

    def _go_on(self, process: Process) -> None:
        """A zombie goes on, and says what it has to say. If it was killed, it dies later."""
        process.go_on()
        self._clock.after(self._cluster.rng.random(), partial(self._die_of_it, process))

    def _die_of_it(self, process: Process) -> None:
        process.unkillable = False
        if process.kill_pending:
            process.kill()

    # ---- what is asked of the engine ---------------------------------------------------------

    def _ask(self, fault: FaultSpec) -> bool:
        """Instructions and device reports. False if it is none of those."""
        rank = RankId(fault.rank)
        match fault.kind:
            case "health":
                self._report_health(rank, fault.level)
            case "health-two":
                two = tuple(sorted((rank, RankId(fault.peer))))
                self._report_shared(f"device of {two}", two, fault)
            case "health-node":
                self._report_shared(NODE, tuple(sorted(self._host.engine.ranks)), fault)
            case "drain":
                self.drained.add(rank)
                self._outside.instruct("isolate", {"id": rank})
            case "switch":
                self._lose_an_expert_rank()
                self._switch(MOST_RETRIES)
            case "rejoin":
                self._rejoin(MOST_RETRIES)
            case "restore":
                self._outside.instruct("restore_experts", {})
            case "retry":
                self._outside.instruct("retry", {})
            case "retries":
                for number in range(NUM_RETRIES):
                    delay_s = number * BETWEEN_RETRIES_S * self._cluster.rng.random()
                    self._later(delay_s, partial(self._outside.instruct, "retry", {}))
            case "pause":
                self._outside.instruct("pause", {})
                self._later(fault.seconds, lambda: self._outside.instruct("resume", {}))
            case _:
                return False
        return True

    def _report_health(self, rank: RankId, level: int) -> None:
        action = self._host.engine.config.policy.action_of(level)
        if action == "isolate":
            self.guilty.add(self._cluster.processes[rank])
        elif action == "drain":
            self.drained.add(rank)
        self._outside.tell_health(DeviceReport(rank, level, "sim", "drawn by the seed", "injected"))

    def _report_shared(self, code: str, ranks: tuple[RankId, ...], fault: FaultSpec) -> None:
        """One signal about several ranks, told of each; that of a node is over after a while."""
        action = self._host.engine.config.policy.action_of(fault.level)
        if code != NODE and action in ("drain", "isolate", "retry"):  # retries may be too many
            self.drained.update(ranks)
        self._outside.tell_health_of(code, ranks, fault.level)
        if code == NODE:
            self._later(fault.seconds, partial(self._outside.tell_health_of, code, ranks, 0))

    def _rejoin(self, retries: int) -> None:
        """Let the first rank that is out come back; if there is none, look again later."""
        out = [view.rank for view in self._host.engine.ranks.values() if view.dead]
        if out:
            self._outside.instruct("rejoin", {"id": out[0]})
        elif retries:
            self._later(RETRY_S, partial(self._rejoin, retries - 1))

    def _lose_an_expert_rank(self) -> None:
        """If there are several that are nothing else."""
        topology = self._host.engine.membership.topology
        ranks = [rank for rank in topology.experts if rank not in topology.attention]
        if len(ranks) > 1:
            self._kill(self._cluster.processes[ranks[-1]])

    def _switch(self, retries: int) -> None:
        """Ask for every attention rank, until one can."""
        engine = self._host.engine
        for rank in engine.membership.topology.attention:
            self.drained.add(rank)
            self._outside.instruct("role_switch", {"id": rank})
        if retries and not engine.epochs.fleet.switched:
            self._later(RETRY_S / 3, partial(self._switch, retries - 1))
