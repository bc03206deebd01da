"""Values that cross the seam between the rank's state machine and whatever executes a step."""

from dataclasses import dataclass
from typing import NamedTuple

from revivemoe.core.sequence import Sequence
from revivemoe.ids import BlockId, Epoch
from revivemoe.messages.tokens import TokenLogprobs


class StepHeader(NamedTuple):
    """What each member tells all others before a step: the fixed-size exchange, all int64."""

    epoch: int
    step: int
    num_tokens: int
    """Tokens this rank will run through the model in this step; 0: it only serves experts."""
    has_work: int
    """1 while any sequence is live here, scheduled in this step or not."""
    wake: int
    """Highest wake counter this rank has seen."""
    num_decodes: int = 0
    """Sequences that take their next token in this step without any prefill."""
    leave: int = 0
    """The epoch this rank was asked to leave for, together with all; 0: none."""


@dataclass(frozen=True)
class Run:
    """All members run this step."""

    tokens_per_member: tuple[int, ...]


@dataclass(frozen=True)
class Park:
    """Nobody has work and all have seen the same wakes: leave the step loop until a higher one."""


@dataclass(frozen=True)
class Retry:
    """Nobody has tokens, but not all are known to be idle: agree again at once.

    It cannot last. A rank with live sequences always schedules tokens, so nobody has work; then
    the wake counters differ, and as each wake is sent to all members, they will soon be equal.
    """


@dataclass(frozen=True)
class Leave:
    """Some member was asked to leave at a step boundary: all leave here, for this epoch."""

    epoch: Epoch


Agreement = Run | Park | Retry | Leave


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's share of a step: tokens [start, start + count) of its history."""

    sequence: Sequence
    start: int
    """Position of the first token to compute; KV of all earlier positions is in the blocks."""
    count: int
    block_table: tuple[BlockId, ...]
    """Covers positions [0, start + count)."""
    samples: bool
    """True if the last of these tokens is the end of the history, so a token is drawn after it."""

    @property
    def is_decode(self) -> bool:
        """One token that follows a drawn one: no prefill."""
        return self.count == 1 and self.samples and bool(self.sequence.output_ids)

    @property
    def num_prompt_logprobs(self) -> int:
        """Entries that `StepResult.prompt_logprobs` has to have; 0 when none are owed."""
        if not self.sequence.owes_prompt_logprobs:
            return 0
        last = len(self.sequence.prompt_ids) - 1
        return max(0, min(self.start + self.count, last) - self.start)


@dataclass(frozen=True)
class Batch:
    """What one rank runs through the model in one step. Empty: it serves experts only."""

    step: int
    items: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.items)

    @property
    def num_decodes(self) -> int:
        return sum(item.is_decode for item in self.items)


@dataclass(frozen=True)
class StepResult:
    """What executing one `ScheduledSequence` yielded."""

    token_id: int | None
    """The drawn token; None where `samples` was False."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Entry i belongs to prompt position start + 1 + i. As many as `num_prompt_logprobs` says."""
