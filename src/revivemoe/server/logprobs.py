"""Log-probabilities in the two shapes of OpenAI's API.

A token reads as what it adds to the text (`detokenizer.Piece`), so that tokens join to the text and
offsets point at them. An alternative, which adds nothing, reads as it would by itself.
"""

from collections.abc import Sequence

from revivemoe.detokenizer import Vocabulary
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.streams import Piece

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say (as in vLLM)."""


class TokenNames:
    """What tokens are called; `as_ids`: `token_id:7` (`return_tokens_as_token_ids`)."""

    def __init__(self, vocabulary: Vocabulary, as_ids: bool) -> None:
        self.vocabulary, self._as_ids = vocabulary, as_ids

    def of(self, token_id: int, piece: Piece | None = None) -> str:
        """`piece`: what it adds to the text, if it was drawn."""
        if self._as_ids:
            return by_id(token_id)
        return self.vocabulary.token_text(token_id) if piece is None else piece.text


def by_id(token_id: int) -> str:
    """A name that no two tokens share."""
    return f"token_id:{token_id}"


class CompletionLogprobs:
    """Of one choice of /v1/completions; follows the offset of each token in the text."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def render(
        self,
        token_ids: Sequence[int],
        pieces: Sequence[Piece],
        entries: Sequence[TokenLogprobs | None],
    ) -> dict[str, object]:
        """One entry per token; None for a prompt's first, which has no predecessor."""
        tokens = [self._names.of(*named) for named in zip(token_ids, pieces, strict=True)]
        return {
            "text_offset": [self._place(piece) for piece in pieces],
            "token_logprobs": [None if e is None else finite(e.logprob) for e in entries],
            "tokens": tokens,
            "top_logprobs": [
                None if e is None else self._alternatives(token_id, token, e)
                for token_id, token, e in zip(token_ids, tokens, entries, strict=True)
            ],
        }

    def _place(self, piece: Piece) -> int:
        offset = self._offset
        self._offset += len(piece.text)
        return offset

    def _alternatives(self, drawn: int, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """The drawn token and the most likely ones, none in another's place: of two that read the
        same, the second is named by its id.
        """
        found = {token: finite(entry.logprob)}
        for token_id, logprob in entry.top:
            if token_id != drawn:
                name = self._names.of(token_id)
                found[by_id(token_id) if name in found else name] = finite(logprob)
        return found


def chat_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    pieces: Sequence[Piece],
    entries: Sequence[TokenLogprobs],
) -> dict[str, object]:
    """Of one choice, or a chunk of it, of /v1/chat/completions."""
    content = [
        {
            "token": names.of(token_id, piece),
            "logprob": finite(entry.logprob),
            "bytes": list(piece.raw),
            "top_logprobs": [
                _alternative(names, i, logprob, piece if i == token_id else None)
                for i, logprob in entry.top
            ],
        }
        for token_id, piece, entry in zip(token_ids, pieces, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    return max(logprob, _FLOOR)


def _alternative(
    names: TokenNames, token_id: int, logprob: float, piece: Piece | None
) -> dict[str, object]:
    """`piece`: of the one that was drawn, which reads as it does in `content`."""
    raw = names.vocabulary.token_bytes(token_id) if piece is None else piece.raw
    return {"token": names.of(token_id, piece), "logprob": finite(logprob), "bytes": list(raw)}
