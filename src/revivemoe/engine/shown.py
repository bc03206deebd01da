"""Which tokens of a choice are settled, and what is shown of each. Pure."""

from collections import deque
from dataclasses import dataclass, replace

from revivemoe.detokenizer import ends_in_a_character, open_end
from revivemoe.engine.stop_strings import Released, Stops, unmarked
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.streams import Piece

_NONE = 1 << 62


@dataclass(frozen=True)
class Token:
    """A committed token."""

    token_id: int
    logprobs: TokenLogprobs | None
    piece: Piece
    mark: str = ""
    """Of a token that is not shown and that a stop string names."""


@dataclass
class _Place:
    """A place in the text: characters that are shown, and marks, before it."""

    shown: int = 0
    marks: int = 0

    def advance(self, text: str) -> None:
        shown = len(unmarked(text))
        self.shown, self.marks = self.shown + shown, self.marks + len(text) - shown


class Shown:
    """Lets tokens go in order, each with as much of its text as is released.

    The text may be held back, or end, anywhere in a token's text: a stop string decides.
    """

    def __init__(self, stops: Stops, open_bytes: bytes = b"") -> None:
        """`open_bytes`: what the prompt leaves of a character that is not whole."""
        self._stops = stops
        self._open = open_bytes
        """Of the last character that has left, if it is not whole."""
        self._waiting: deque[Token] = deque()
        self._taken, self._released = _Place(), _Place()
        """Up to where tokens and text have left."""

    def push(self, token: Token) -> None:
        """One more token. Nothing is said yet of its text."""
        self._waiting.append(token)

    def release(self, released: Released) -> list[Token]:
        """Tokens that are settled now that so much more text has left."""
        self._released.advance(released.text)
        settled = []
        while self._waiting and self._is_settled(self._waiting[0]):
            settled.append(self._take(self._waiting.popleft()))
        return settled

    def release_all(self, released: Released) -> list[Token]:
        """The rest, when no text is held back any more."""
        plain = len(released.text) - released.num_spelled
        self._released.advance(released.text[:plain])
        spelled_from = self._released.marks
        self._released.advance(released.text[plain:])
        stopped = released.stop is not None
        settled = [self._take(token, stopped, spelled_from) for token in self._waiting]
        self._waiting.clear()
        return settled

    def text(self, released: Released) -> str:
        """Of it what is shown."""
        plain = len(released.text) - released.num_spelled
        return unmarked(released.text[:plain]) + self._stops.spelled(released.text[plain:])

    def _is_settled(self, token: Token) -> bool:
        end, marks = self._taken.shown + len(token.piece.text), self._taken.marks + len(token.mark)
        if not ends_in_a_character(token.piece):  # the character may be held back
            end += 1
        return end <= self._released.shown and marks <= self._released.marks

    def _take(self, token: Token, stopped: bool = False, spelled_from: int = _NONE) -> Token:
        """With what is shown of it. `spelled_from`: how many marks are not spelled out."""
        text, raw = token.piece.text, token.piece.raw
        left = self._released.shown - self._taken.shown
        self._taken.advance(text + token.mark)
        shown = text[: max(0, left)]
        open_too = stopped and not ends_in_a_character(token.piece) and left <= len(text)
        if len(shown) < len(text) or open_too:
            raw = self._bytes_of(shown, raw)
        self._open = open_end(self._open + raw)
        if token.mark and spelled_from < self._taken.marks <= self._released.marks:
            spelled = self._stops.spelled(token.mark)
            shown, raw = shown + spelled, raw + spelled.encode()
        return replace(token, piece=Piece(shown, raw))

    def _bytes_of(self, text: str, raw: bytes) -> bytes:
        """The first bytes of a token that are so much of its text."""
        ways = (raw[:end] for end in range(len(raw) + 1))
        alike = (way for way in ways if (self._open + way).decode(errors="replace") == text)
        return next(alike, text.encode())
