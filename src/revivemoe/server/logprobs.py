"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Sequence

from revivemoe.detokenizer import Vocabulary
from revivemoe.messages.tokens import TokenLogprobs

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say (as in vLLM)."""


class CompletionLogprobs:
    """Of one choice of /v1/completions; follows the offset of each token in the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0

    def render(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> dict[str, object]:
        """One entry per token; None for a prompt's first, which has no predecessor."""
        tokens = [self._vocabulary.token_text(i) for i in token_ids]
        return {
            "text_offset": [self._place(token) for token in tokens],
            "token_logprobs": [None if e is None else finite(e.logprob) for e in entries],
            "tokens": tokens,
            "top_logprobs": [
                None if e is None else self._alternatives(token, e)
                for token, e in zip(tokens, entries, strict=True)
            ],
        }

    def _place(self, token: str) -> int:
        offset = self._offset
        self._offset += len(token)
        return offset

    def _alternatives(self, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the drawn one. Of tokens that read the same, the likelier."""
        found = {token: finite(entry.logprob)}
        for token_id, logprob in entry.top:
            text = self._vocabulary.token_text(token_id)
            found[text] = max(finite(logprob), found.get(text, _FLOOR))
        return found


def chat_logprobs(
    vocabulary: Vocabulary, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> dict[str, object]:
    content = [
        {
            **_chat_token(vocabulary, token_id, entry.logprob),
            "top_logprobs": [_chat_token(vocabulary, i, logprob) for i, logprob in entry.top],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    return max(logprob, _FLOOR)


def _chat_token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": vocabulary.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(vocabulary.token_bytes(token_id)),
    }
