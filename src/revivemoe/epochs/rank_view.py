"""What the host knows of one rank, through all its processes."""

from dataclasses import dataclass, field

from revivemoe.epochs.rank_life import BEFORE_EPOCH, OUT, Gone, Life, Member, Ready, Spawning
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.placement import Table
from revivemoe.messages.reports import RankStats
from revivemoe.recovery.faults import Fault

FIRST, NEVER = Incarnation(0), Gone(0.0)
KEPT_CODES = 64
"""Codes that only are watched, of one device; beyond that the oldest is forgotten."""


@dataclass
class RankView:
    """One rank. Where its process stands is `life`; whatever asks for that, asks there."""

    rank: RankId
    device: str
    incarnation: Incarnation = FIRST
    life: Life = NEVER
    pid: int | None = None
    host: str = ""
    maskable: bool = True
    graphs: str = ""
    """Of graph mode: how many its process has, or why none."""
    stats: RankStats = field(default_factory=RankStats)
    fault: Fault | None = None
    """Why it is out, or what its device reports while it lives."""
    device_faults: dict[str, Fault] = field(default_factory=dict)
    """Why it is to go, as monitors of its device say, by code; whatever process runs. Not taken
    back: no new process is started there."""
    device_watched: dict[str, Fault] = field(default_factory=dict)
    """What they have said besides."""
    taken_out: bool = False
    """An operator wants it out."""
    request_id: str | None = None
    """Of the operator's request that its process, or the next one, is to come in by: back, or in
    another role."""
    slow: float | None = None
    """How many times longer than its peers it takes, if it is slow."""
    last_words: str = ""
    table: Table = ()
    """What its slots hold before it is a member, [L][S]."""

    @property
    def dead(self) -> bool:
        """It has no process that may take part: accused, taken out, or gone."""
        return isinstance(self.life, OUT)

    @property
    def ready(self) -> bool:
        """It has loaded, and takes part in epochs, or may."""
        return isinstance(self.life, Ready | Member)

    @property
    def member(self) -> bool:
        """Its present process takes part in the present epoch."""
        return isinstance(self.life, Member)

    @property
    def draining(self) -> bool:
        return isinstance(self.life, Member) and self.life.draining

    @property
    def loading(self) -> bool:
        """Its process is under way."""
        return isinstance(self.life, BEFORE_EPOCH) and not self.ready

    @property
    def device_codes(self) -> list[str]:
        return [*self.device_faults, *self.device_watched]

    def device_says(self, code: str, fault: Fault | None, takes_out: bool = False) -> None:
        """What a monitor says now under this code; None: nothing any more."""
        self.device_faults.pop(code, None)
        self.device_watched.pop(code, None)
        if fault is not None:
            (self.device_faults if takes_out else self.device_watched)[code] = fault
        for codes in (self.device_faults, self.device_watched):
            while len(codes) > KEPT_CODES:
                del codes[next(iter(codes))]
        self._show_device()

    def vouch(self) -> None:
        """An operator wants it back, whatever has taken it out, until it is told of anew."""
        self.taken_out, self.fault = False, None
        self.device_faults.clear()
        self._show_device()

    def _show_device(self) -> None:
        """`fault` is the worst that is said of its device, if it is of nothing else."""
        if self.fault is not None and self.fault.kind != "device_fault":
            return
        watched = () if self.dead else self.device_watched.values()
        said = (*self.device_faults.values(), *watched)
        self.fault = max(said, key=lambda fault: fault.level, default=None)

    def renew(self) -> Incarnation:
        """Turn to a new process."""
        assert isinstance(self.life, Spawning), f"rank {self.rank} has no new one: {self.life}"
        self.incarnation = Incarnation(self.incarnation + 1)
        self.pid, self.fault, self.slow, self.last_words = None, None, None, ""
        self.stats, self.graphs = RankStats(), ""
        self._show_device()
        return self.incarnation
