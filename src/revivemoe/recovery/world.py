"""Everything a plan depends on, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from revivemoe.ids import RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import ExpertPlacement, Reload, Table
from revivemoe.membership.topology import Topology


@dataclass(frozen=True)
class SequenceView:
    """One unfinished sequence, as its owner's host knows it."""

    seq_id: SeqId
    owner: RankId | None
    """None while no rank has it: it waits for its first one, or has lost its last one."""
    num_tokens: int
    """Prompt and committed output: what a migration would compute again."""
    arrival: int
    orphan: bool = False
    """It has lost its rank."""
    held: bool = False
    """It may not run now: another suspect is being tried alone."""


@dataclass(frozen=True)
class World:
    """Everything the plan depends on."""

    membership: Membership
    """Of the present epoch."""
    sequences: tuple[SequenceView, ...]
    maskable: bool
    """Whether the model's routers can leave experts out."""
    recent_recoveries: int
    """Recoveries in a row, within the policy's window, that brought no step forward; this one not
    counted."""
    recent_restarts: int = 0
    """Restarts of ranks likewise."""
    home: Topology | None = None
    """The topology the instance was started with: roles and order of ranks that come back."""
    gone: tuple[RankId, ...] = ()
    """Members whose process of this epoch is gone, accused or not."""
    ready: tuple[RankId, ...] = ()
    """Ranks whose new process waits to be taken in."""
    tables: Mapping[RankId, Table] = field(default_factory=dict)
    """What the slots of those shall hold."""
    held: Mapping[RankId, Table] = field(default_factory=dict)
    """What the slots of those hold that have told it since the fence went up. What the map says of
    them may be on its way, or overwritten already."""
    launching: tuple[RankId, ...] = ()
    """Ranks whose new process is still loading."""
    awaited: frozenset[RankId] = frozenset()
    """Of these, expert ranks that are started for the change under way."""
    relaunchable: tuple[RankId, ...] = ()
    """Ranks without a process, for which one may be started."""
    last_resort: tuple[RankId, ...] = ()
    """Others without one: their devices are bad, or an operator has taken them out."""
    loaded: tuple[Reload, ...] = ()
    """Experts that lie in slots the map does not name yet."""
    loading: tuple[Reload, ...] = ()
    """Experts that are being loaded beside the steps."""
    refusing: frozenset[RankId] = frozenset()
    """Ranks that could not load a moment ago."""
    domain_failures: int = 0
    """Domains in a row that did not come about."""
    trials: frozenset[RankId] = frozenset()
    """Ranks on which a suspect is tried: nothing new goes there."""
    can_load: bool = True
    """False while loading experts has just failed."""
    home_placement: ExpertPlacement | None = None
    """The experts' map that the instance was started with."""
    switched: Mapping[RankId, RankId | None] = field(default_factory=dict)
    """Ranks that have become expert ranks, or are about to, and whose place they take; `home` has
    them as such."""
    switch: RankId | None = None
    """An attention rank that somebody wants to become an expert rank."""

    def __post_init__(self) -> None:
        assert not self.ready or self.home is not None, "ranks come back to a world without a home"
        assert not set(self.ready) & set(self.launching), "a rank is ready and still loading"
        members = set(self.membership.members) - set(self.gone)
        assert not members & set(self.ready), "a rank is to be taken in and is there already"
