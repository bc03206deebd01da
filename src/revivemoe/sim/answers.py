"""What each request must come to, whatever happens: a pure function of prompt and choice.

The fake model draws the next token by a checksum of the whole history, so any token lost, repeated
or altered on the way changes everything after it. This file works without ledger and token log.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sampling_params import FinishReason
from revivemoe.streams import Submission, choice_indices

VOCABULARY = 26
EOS = 0
POISON = 200
"""A prompt token: whoever runs a sequence with it dies."""


@dataclass(frozen=True)
class Answer:
    """The fault-free stream of one choice."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None


def next_token(history: Sequence[int], choice: int) -> int:
    return crc32(bytes(history), choice + 1) % VOCABULARY


def logprob_of(history: Sequence[int], position: int) -> TokenLogprobs:
    """Log-probability of the token at `position` of the history."""
    return TokenLogprobs(logprob=-float(crc32(bytes(history[: position + 1])) % 97), top=[])


def letter(token_id: int) -> str:
    return chr(97 + token_id)


def answers(submission: Submission, max_model_len: int) -> list[Answer]:
    """One for each choice of each prompt, in the order of `Delta.index`."""
    return [
        _answer(submission.prompts[prompt], choice, submission, max_model_len)
        for prompt, choice in choice_indices(submission.prompts, submission.n)
    ]


def _answer(
    prompt: tuple[int, ...], choice: int, submission: Submission, max_model_len: int
) -> Answer:
    params, history = submission.params, list(prompt)
    while True:
        token = next_token(history, choice)
        history.append(token)
        output = history[len(prompt) :]
        text = "".join(map(letter, output))
        if len(output) > params.min_tokens:
            if token in params.eos_token_ids or token in params.stop_token_ids:
                reason = None if token in params.eos_token_ids else token
                return Answer(tuple(output), text[:-1], "stop", reason)
            for stop in sorted(submission.stop.strings, key=len, reverse=True):
                if text.endswith(stop):
                    return Answer(tuple(output), text[: -len(stop)], "stop", stop)
        if len(output) >= params.max_tokens or len(history) >= max_model_len:
            return Answer(tuple(output), text, "length", None)
