"""The fake tokenizer: every token is one letter."""

from collections.abc import Sequence

from revivemoe.detokenizer import Detokenizer, Vocabulary
from revivemoe.sim.answers import letter
from revivemoe.streams import Piece


class Letters:
    open_bytes = b""

    def push(self, token_id: int) -> Piece:
        return Piece(letter(token_id), letter(token_id).encode())

    def flush(self) -> str:
        return ""


class LetterVocabulary(Vocabulary):
    """A vocabulary that needs no tokenizer."""

    def __init__(self) -> None:
        self.specials = {}

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        return Letters()
