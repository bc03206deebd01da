"""What the host knows of one rank, through all its processes."""

from dataclasses import dataclass, field

from revivemoe.epochs.rank_life import BEFORE_EPOCH, OUT, Gone, Life, Member, Ready, Spawning
from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.placement import Table
from revivemoe.messages.reports import RankStats
from revivemoe.recovery.faults import Fault

FIRST, NEVER = Incarnation(0), Gone(0.0)


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
    stats: RankStats = field(default_factory=RankStats)
    fault: Fault | None = None
    """Why it is out, or what its device reports while it lives."""
    device_faults: dict[str, Fault] = field(default_factory=dict)
    """What monitors have said of its device, by code, and not taken back; whatever process runs."""
    taken_out: bool = False
    """An operator wants it out."""
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

    def renew(self) -> Incarnation:
        """Turn to a new process."""
        assert isinstance(self.life, Spawning), f"rank {self.rank} has no new one: {self.life}"
        self.incarnation = Incarnation(self.incarnation + 1)
        self.pid, self.fault, self.slow, self.last_words = None, None, None, ""
        self.stats = RankStats()
        return self.incarnation
