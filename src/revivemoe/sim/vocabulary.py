"""The fake tokenizer: every token is one letter."""

from collections.abc import Sequence

from revivemoe.detokenizer import Detokenizer, Vocabulary
from revivemoe.sim.answers import letter


class Letters:
    def push(self, token_id: int) -> str:
        return letter(token_id)

    def flush(self) -> str:
        return ""


class LetterVocabulary(Vocabulary):
    """A vocabulary that needs no tokenizer."""

    def __init__(self) -> None:
        self.skip_special_tokens = True

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        return Letters()
