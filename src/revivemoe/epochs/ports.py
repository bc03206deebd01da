"""The two seams between recovery and the engine that hosts it."""

from typing import Protocol

from revivemoe.ids import RankId, SeqId
from revivemoe.messages.reports import Command
from revivemoe.recovery.planner import SequenceView


class RankPort(Protocol):
    """Reaches ranks. No call ever blocks, or fails because a rank is gone."""

    def send(self, rank: RankId, command: Command) -> None: ...

    def kill(self, rank: RankId) -> None:
        """End the rank's present process, if it still runs. Hygiene: nobody waits for it."""
        ...

    def restart(self, rank: RankId) -> None:
        """Start a new process for the rank, once the present one, if any, is gone."""
        ...


class SequenceOwner(Protocol):
    """Owns the truth about requests: the token log."""

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
