"""Makes the faults of a scenario happen at their moments, and remembers what was done to whom."""

from collections import Counter
from functools import partial
from typing import assert_never

from revivemoe.ids import RankId
from revivemoe.messages import Fatal
from revivemoe.sim.clock import Clock
from revivemoe.sim.cluster import SimCluster
from revivemoe.sim.faults import AtPoint, AtTime, FaultSpec, InStage
from revivemoe.sim.host import EngineHost, stage_of
from revivemoe.sim.process import Process
from revivemoe.sim.requests import Idle, Request

SLOWNESS = 5.0


class Strikes:
    """The faults still to come, and what those that came make excusable."""

    def __init__(
        self, clock: Clock, cluster: SimCluster, host: EngineHost, faults: tuple[FaultSpec, ...]
    ) -> None:
        self.struck: list[tuple[FaultSpec, str]] = []
        """Each fault with the stage it struck in."""
        self.guilty: set[Process] = set()
        """What the engine may accuse."""
        self.stalled_until = 0.0
        self._clock, self._cluster, self._host = clock, cluster, host
        self._waiting = [f for f in faults if not isinstance(f.when, AtTime)]
        self._timed = [f for f in faults if isinstance(f.when, AtTime)]
        self._under_way = 0
        self._slow: set[Process] = set()
        cluster.on_reach = self.reach

    @property
    def pending(self) -> bool:
        """Some fault has begun to happen and has not struck yet."""
        return self._under_way > 0

    def on_serving(self) -> None:
        """The instance serves for the first time: faults at a time count from here."""
        for fault in self._timed:
            assert isinstance(fault.when, AtTime)
            self._later(fault, fault.when.seconds)
        self._timed = []

    def on_stage(self, stage: str) -> None:
        """The engine has entered a stage: the first fault that waits for it strikes soon."""
        for fault in self._waiting:
            if isinstance(fault.when, InStage) and fault.when.stage == stage:
                self._waiting.remove(fault)
                self._later(fault, fault.when.delay_s)
                return

    def reach(self, process: Process, request: Request) -> float:
        """A step loop is at this place: strike what waits for it. Returns its slowness."""
        if not isinstance(request, Idle):
            for fault in self._waiting:
                if _is_at(fault, process, request):
                    self._waiting.remove(fault)
                    self._strike(fault)
                    break
        return SLOWNESS if process in self._slow else 1.0

    # ---- striking ----------------------------------------------------------------------------

    def _later(self, fault: FaultSpec, delay_s: float) -> None:
        self._under_way += 1
        self._clock.after(delay_s, partial(self._strike_later, fault))

    def _strike_later(self, fault: FaultSpec) -> None:
        self._under_way -= 1
        self._strike(fault)

    def _strike(self, fault: FaultSpec) -> None:
        self.struck.append((fault, stage_of(self._host.engine)))
        process = self._process(fault.rank)
        match fault.kind:
            case "kill":
                self._kill(process)
            case "kill-two":
                self._kill(process)
                self._kill(self._process(fault.peer))
            case "kill-all":
                for each in self._cluster.processes.values():
                    self._kill(each)
            case "error":
                self._fail(process)
            case "stop" | "corpse" | "zombie":
                self._stop(process, fault)
            case "hang":
                self.guilty.add(process)
                process.hung = True
            case "slow":
                self._slow.add(process)
            case "stall":
                self._host.stall(fault.seconds)
                self.stalled_until = self._clock.now + fault.seconds
            case "forkserver":
                self._cluster.forkserver_alive = False
                self._host.call(self._host.engine.on_forkserver_gone)
            case "link" | "link-twice" | "nan" | "nan-twice" | "health" | "poison":
                raise NotImplementedError(fault.kind)
            case _:
                assert_never(fault.kind)

    def _process(self, rank: int) -> Process:
        return self._cluster.processes[RankId(rank)]

    def _kill(self, process: Process) -> None:
        self.guilty.add(process)
        process.die("killed by signal 9")

    def _fail(self, process: Process) -> None:
        self.guilty.add(process)
        process.report(Fatal(process.rank, process.incarnation, "RuntimeError: device lost"))
        process.die("exited with status 1")

    def _stop(self, process: Process, fault: FaultSpec) -> None:
        self.guilty.add(process)
        process.unkillable = fault.kind != "stop"
        process.stop()
        if fault.kind == "zombie":
            self._clock.after(fault.seconds, process.go_on)


def _is_at(fault: FaultSpec, process: Process, request: Request) -> bool:
    """Later steps match too: a step that the rank did not take part in disarms nothing."""
    when = fault.when
    return (
        isinstance(when, AtPoint)
        and fault.rank == process.rank
        and process.step >= when.step
        and not isinstance(request, Idle)
        and request.phase == when.phase
        and request.layer in (when.layer, -1)
    )


def coverage(struck: list[tuple[FaultSpec, str]]) -> Counter[tuple[str, str]]:
    """(kind, stage) of the faults that struck."""
    return Counter((fault.kind, stage) for fault, stage in struck)
