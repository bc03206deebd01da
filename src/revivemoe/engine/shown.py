"""Which tokens of a choice are settled, and what is shown of each. Pure."""

from collections import deque
from dataclasses import dataclass

from revivemoe.engine.stop_strings import unmarked
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.streams import Piece


@dataclass(frozen=True)
class Token:
    """A committed token."""

    token_id: int
    logprobs: TokenLogprobs | None
    piece: Piece
    """With the mark of a hidden token that a stop string names."""


class Shown:
    """Lets tokens go in order, each with as much of its text as is released.

    The text may be held back, or end, anywhere in a token's text: a stop string decides.
    """

    def __init__(self) -> None:
        self._waiting: deque[Token] = deque()
        self._offset = 0
        """Characters before the first that waits."""
        self._released = 0

    def push(self, token: Token) -> None:
        """One more token. Nothing is said yet of its text."""
        self._waiting.append(token)

    def release(self, num_chars: int) -> list[Token]:
        """Tokens that are settled now that so many more characters have left."""
        self._released += num_chars
        settled = []
        while self._waiting and self._is_settled(self._waiting[0].piece):
            settled.append(self._take(self._waiting.popleft()))
        return settled

    def release_all(self, num_chars: int, stopped: bool = False) -> list[Token]:
        """The rest, when no text is held back any more. `stopped`: by a stop string, and what has
        not left by now never does.
        """
        self._released += num_chars
        settled = [self._take(token, stopped) for token in self._waiting]
        self._waiting.clear()
        return settled

    def _is_settled(self, piece: Piece) -> bool:
        end = self._offset + len(piece.text)
        if not piece.text and piece.raw:  # part of a character, which may be held back
            return end < self._released
        return end <= self._released

    def _take(self, token: Token, stopped: bool = False) -> Token:
        """With what is shown of it."""
        start, text, raw = self._offset, token.piece.text, token.piece.raw
        self._offset += len(text)
        shown = text[: max(0, self._released - start)]
        if len(shown) < len(text) or (stopped and start >= self._released):
            raw = unmarked(shown).encode()
        return Token(token.token_id, token.logprobs, Piece(unmarked(shown), raw))
