"""What is live: requests, their sequences, and what became of a report about them."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from revivemoe.engine.stop_strings import Stops
from revivemoe.engine.token_log import TokenLog
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.streams import Delta, PromptLogprobsReady, StreamEvent, Submission

Owner = tuple[RankId, Incarnation]
"""A process."""


class Sink(Protocol):
    """Where a request's events go."""

    def push(self, event: StreamEvent) -> None: ...

    def end(self) -> None:
        """No event follows."""
        ...


@dataclass
class LiveSequence:
    """One unfinished choice."""

    seq_id: SeqId
    log: TokenLog
    request: "LiveRequest"
    owner: Owner | None = None
    """The process that may report tokens for it; None while it waits for a rank."""
    orphan: bool = False
    """It has lost its rank."""
    proven: bool = False
    """It has got on by a token on its present rank."""
    ran: bool = False
    """Its present rank may have run it: it had it while an epoch was served."""

    @property
    def age(self) -> tuple[int, SeqId]:
        """Older ones first."""
        return self.request.arrival, self.seq_id

    @property
    def num_tokens(self) -> int:
        return len(self.log.prompt_ids) + len(self.log.output_ids)


@dataclass
class LiveRequest:
    """One submission with some choice unfinished."""

    submission: Submission
    sink: Sink
    arrival: int
    """Order of admission: unique among all requests."""
    stops: Stops
    unfinished: set[SeqId] = field(default_factory=set)
    held: dict[int, list[Delta]] = field(default_factory=dict)
    """By prompt index: deltas that wait for the prompt's log-probabilities, which come first."""
    ended: bool = False

    def emit(self, delta: Delta) -> None:
        """Pass a delta on, or hold it back."""
        waiting = self.held.get(delta.index // self.submission.n)
        if waiting is None:
            self.sink.push(delta)
        else:
            waiting.append(delta)

    def release(self, prompt_index: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """The prompt's log-probabilities are complete: they, then what waited for them."""
        self.sink.push(PromptLogprobsReady(prompt_index, entries))
        for delta in self.held.pop(prompt_index, []):
            self.sink.push(delta)

    def end(self) -> None:
        """No event follows. Idempotent."""
        if not self.ended:
            self.ended = True
            self.sink.end()


class Taken(NamedTuple):
    """A token that was new."""

    first: bool
    finish_reason: str | None
    released: bool


@dataclass(frozen=True)
class Arrival:
    """What one `Tokens` report brought, for the metrics."""

    new_tokens: int
    first_tokens: int
    finished: tuple[str, ...]
    """Finish reasons of the sequences that ended."""
    released: bool = False
    """Some sequence has got on by its first token on its rank: a suspect may wait for that."""


@dataclass(frozen=True)
class Assigned:
    """One sequence that was given to a rank."""

    seq_id: SeqId
    num_tokens: int
    orphan: bool
    """It had lost its rank before."""
