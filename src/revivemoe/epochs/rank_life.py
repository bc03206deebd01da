"""What the engine knows of one rank for life."""

from dataclasses import dataclass, field

from revivemoe.ids import Incarnation, RankId
from revivemoe.membership.placement import Table
from revivemoe.messages.reports import RankStats
from revivemoe.recovery.faults import Fault


@dataclass
class RankView:
    """One rank, through all its processes."""

    rank: RankId
    incarnation: Incarnation
    device: str
    pid: int | None = None
    host: str = ""
    launched: bool = False
    """A process was asked for, and is not known to be gone or accused."""
    ready: bool = False
    """It has loaded, and takes part in epochs."""
    dead: bool = False
    """Accused, taken out, or its process is gone."""
    draining: bool = False
    restart_when_gone: bool = False
    """A new process is wanted as soon as the present one is gone."""
    condemned_at: float = float("-inf")
    """When it was last accused."""
    maskable: bool = True
    stats: RankStats = field(default_factory=RankStats)
    fault: Fault | None = None
    """Why it is dead, or what its device reports while it lives."""
    slow: float | None = None
    """How many times longer than its peers it takes, if it is slow."""
    last_words: str = ""
    table: Table = ()
    """The experts its process was started with, [L][S]."""

    @property
    def loading(self) -> bool:
        """Its process is under way."""
        return self.launched and not self.ready and not self.dead

    def relaunch(self) -> Incarnation:
        """Turn to a new process."""
        assert not self.ready, f"rank {self.rank} has a process that takes part"
        self.incarnation = Incarnation(self.incarnation + 1)
        self.pid, self.fault, self.slow, self.last_words = None, None, None, ""
        self.launched, self.ready, self.dead = True, False, False
        self.draining = self.restart_when_gone = False
        self.stats = RankStats()
        return self.incarnation

    def condemn(self, fault: Fault | None) -> None:
        """It is out."""
        self.dead, self.ready, self.launched, self.draining = True, False, False, False
        if fault is not None:
            self.fault = fault
