"""What travels of sequences: handed to a rank, and committed by it."""

import msgspec

from revivemoe.ids import SeqId
from revivemoe.sampling_params import SamplingParams


class SequenceSpec(msgspec.Struct, frozen=True):
    """A sequence as it is handed to a rank: new, or migrated with what it has committed so far."""

    seq_id: SeqId
    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    arrival: int
    """Admission order over the whole instance; smaller is older."""
    prompt_logprobs_done: int = 0
    """Prompt positions whose log-probabilities the engine already holds."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of one token and of the most likely alternatives at its position."""

    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), most likely first."""


class CommittedToken(msgspec.Struct, frozen=True):
    seq_id: SeqId
    position: int
    """Index into the output tokens: the log appends if and only if it equals its length."""
    token_id: int
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True):
    seq_id: SeqId
    start: int
    """Prompt position of the first entry. Position 0 has no predecessor and is never sent."""
    entries: list[TokenLogprobs]
