"""The seams between the epochs and their host: reach ranks, start them, own sequences.

Whatever schedules sequences onto ranks can be put under recovery through these.
"""

from typing import Protocol

from revivemoe.epochs.record import RecoveryRecord
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table
from revivemoe.messages.commands import Command, DomainSpec
from revivemoe.recovery.faults import Fault
from revivemoe.recovery.plan import Continue
from revivemoe.recovery.world import SequenceView


class Cluster(Protocol):
    """Starts ranks and reaches them. No call blocks, or fails because a rank is gone."""

    def launch(self, rank: RankId, incarnation: Incarnation, slots: Table) -> None:
        """Start a process for a rank, with these experts in its slots."""
        ...

    def send(self, rank: RankId, command: Command) -> None: ...

    def kill(self, rank: RankId) -> None:
        """End the rank's present process, if it still runs. Hygiene: nobody waits for it."""
        ...

    def domain(self) -> DomainSpec:
        """How the members of the next epoch shall reach each other."""
        ...


class RankPort(Protocol):
    """Reaches ranks, for whoever carries a plan out. No call blocks, or fails."""

    def send(self, rank: RankId, command: Command) -> None: ...


class SequenceOwner(Protocol):
    """Owns the truth about requests: the token log."""

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        ...

    @property
    def trials(self) -> frozenset[RankId]:
        """Ranks on which a suspect is being tried: nothing new goes there."""
        ...

    def unfinished(self) -> tuple[SequenceView, ...]:
        """Every sequence that is not finished."""
        ...

    def reconcile(self, rank: RankId, num_output: dict[SeqId, int]) -> int:
        """Make a survivor's holdings agree with the log: re-add, or free, as needed.

        Returns how many sequences had to be mended.
        """
        ...

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        """Give a sequence to another rank as prompt + committed tokens, under the same stream."""
        ...

    def lost(self, rank: RankId, fault: Fault | None) -> None:
        """The rank's process is out, and what it ran has no rank any more. `fault`: why, unless it
        is replaced without one of its own."""
        ...

    def planned(self, plan: Continue) -> None:
        """This plan is being carried out; its sequences have been handed over."""
        ...

    def met(self) -> None:
        """The members of the epoch to come have met: they run steps, before the engine has heard
        of all of them."""
        ...

    def epoch_left(self) -> None:
        """The epoch is at its end: what is new waits for the next one."""
        ...

    def epoch_began(self, membership: Membership, record: RecoveryRecord | None) -> None:
        """The instance serves in a new epoch: what waits can be given to its ranks. `record`: of
        the change that led there; None for the first one."""
        ...

    def failed(self, reason: str) -> int:
        """The instance is at its end: so are all streams. Returns how many that were."""
        ...
