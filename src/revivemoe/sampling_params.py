"""What a request asks of the sampler, and when a sequence is finished. Values only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Everything besides logits and token history that decides the next token.

    The next token is a pure function of (logits, these parameters, position, prompt ids, output
    ids). `seed` is always set: an unseeded request gets one at admission, so that any rank can
    continue it.
    """

    seed: int
    choice: int = 0
    """Index among the `n` choices of one prompt: choices of one request draw differently."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), before penalties."""
    max_tokens: int = 16
    min_tokens: int = 0
    """Below this many output tokens, end-of-sequence and stop tokens cannot be drawn."""
    eos_token_ids: tuple[int, ...] = ()
    """Empty when the request ignores end-of-sequence."""
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """Alternatives to report beside each drawn token; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (`echo` with `logprobs`)."""


@dataclass(frozen=True)
class SamplingDefaults:
    """For what a request does not say; `SamplingParams` says what each means."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    """Of a chat; None: to the end of the context. A completion has OpenAI's own default."""
    max_tokens_limit: int | None = None
    """No request generates more, whatever it says."""


def finish_reason(
    params: SamplingParams, prompt_len: int, output_ids: Sequence[int], max_model_len: int
) -> FinishReason | None:
    """Why a sequence with these committed tokens is over, or None while it goes on.

    Rank and engine both call this, so they cannot disagree. Stop *strings* are the engine's.
    """
    num_output = len(output_ids)
    if num_output and num_output > params.min_tokens:
        last = output_ids[-1]
        if last in params.eos_token_ids or last in params.stop_token_ids:
            return "stop"
    full = num_output and prompt_len + num_output >= max_model_len  # one is drawn in any case
    if num_output >= params.max_tokens or full:
        return "length"
    return None
