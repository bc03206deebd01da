"""The seam between the HTTP server and the engine: what is submitted, what streams back."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import FinishReason, SamplingDefaults, SamplingParams

Document = dict[str, object]
"""A JSON object."""


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a choice; the engine matches them, ranks never see text."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False


@dataclass(frozen=True)
class Submission:
    """One HTTP request: `n` choices for each prompt."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    params: SamplingParams
    """`choice` is filled in per sequence by the engine; `seed` is already set."""
    stop: StopStrings = field(default_factory=StopStrings)
    skip_special_tokens: bool = True
    """Special tokens have no text."""
    streamed: bool = False
    """Its client hears of us while it waits, and can wait long."""


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text."""

    text: str
    """Empty while a character is not whole, and for a token that is not shown."""
    raw: bytes
    """Its own bytes; they may be part of a character. Those of a text's pieces join to the text."""


@dataclass(frozen=True)
class Delta:
    """New output of one choice. Token ids come at commit even while text is held back; with
    log-probabilities, once it is known what is shown of each.
    """

    index: int
    """prompt index * n + choice."""
    token_ids: tuple[int, ...]
    text: str
    pieces: tuple[Piece, ...] = ()
    """One per token id: over a whole choice they join to the text, if log-probabilities were asked
    for.
    """
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token id when log-probabilities were asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or string that ended it, if one did."""
    degraded: bool = False
    """True if experts were missing at any time while this choice was generated."""


@dataclass(frozen=True)
class PromptLogprobsReady:
    """Log-probabilities of a prompt's tokens 1..len-1; sent before the first `Delta`."""

    prompt_index: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class StreamFailed:
    """The stream ends here with an error event."""

    message: str
    status: int = 500


StreamEvent = Delta | PromptLogprobsReady | StreamFailed


class Stream(Protocol):
    """Events of one submission, in order, until every choice is finished or the stream failed."""

    degraded_from_start: bool
    """Experts were missing when the submission was admitted."""

    def __aiter__(self) -> AsyncIterator[StreamEvent]: ...

    def close(self) -> None:
        """Abort whatever is unfinished. Idempotent; called when the client goes away."""


@dataclass(frozen=True)
class ModelInfo:
    """What the server must know of the model to check a request."""

    name: str
    model_dir: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


class EngineUnavailable(Exception):
    """The engine cannot take requests (failed, or starting for too long). HTTP 503."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class FellBehind(Exception):
    """A reader of events has read so slowly that some are lost to it."""


class ServingEngine(Protocol):
    """What the server may ask of the engine."""

    model: ModelInfo

    async def submit(self, submission: Submission) -> Stream:
        """Admit a request. While recovering this waits (bounded) rather than fails.

        Raises EngineUnavailable.
        """

    def status(self) -> Document:
        """The document of `GET /v1/fault_tolerance/status`: one consistent snapshot."""

    def metrics(self) -> bytes:
        """Prometheus exposition text."""

    @property
    def state_name(self) -> str:
        """As the status document spells it. A look at a field: probes ask often."""

    @property
    def alive(self) -> bool:
        """False once the state is `failed`."""

    @property
    def ready(self) -> bool:
        """True while `serving`."""

    async def apply(self, instruction: str, params: Document, request_id: str) -> Document | None:
        """Fault-tolerance instruction. Raises ValueError with the reason for wrong input.

        Returns a document for `whatif`, None otherwise.
        """

    async def inject(self, fault: Document) -> str:
        """Inject a fault; returns the injection id. Raises ValueError, PermissionError."""

    def events(self) -> AsyncIterator[Document]:
        """Signals, decisions and stages as they happen (server-sent events). Raises FellBehind."""


def choice_indices(prompts: Sequence[Sequence[int]], n: int) -> list[tuple[int, int]]:
    """(prompt index, choice) of every sequence, in the order of their `Delta.index`."""
    return [(p, c) for p in range(len(prompts)) for c in range(n)]
