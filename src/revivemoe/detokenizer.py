"""Token ids to text, one token at a time, equal to decoding all of them at once.

Byte-level tokenizers (Qwen, DeepSeek, GLM, gpt-oss ...) map each token to fixed bytes, so the bytes
go through an incremental UTF-8 decoder. Every other tokenizer is decoded over a sliding window,
as in Hugging Face's text-generation-inference.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import AddedToken

REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
"""Prompt tokens that a window starts with, so that a leading space of the output survives."""


class Backend(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    decoder: object

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...
    def id_to_token(self, id: int) -> str | None: ...
    def get_added_tokens_decoder(self) -> "Mapping[int, AddedToken]": ...


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of `transformers`."""

    @property
    def backend_tokenizer(self) -> Backend: ...
    @property
    def chat_template(self) -> object: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def apply_chat_template(
        self, conversation: list[dict[str, object]], **options: bool
    ) -> object: ...


class Detokenizer(Protocol):
    """The text of one choice. Never returns part of a character."""

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""

    def flush(self) -> str:
        """What is still held back, broken characters replaced by U+FFFD. Once, at the end."""


class Vocabulary:
    """What the detokenizers of one tokenizer share: the bytes of each token, decoded once.

    Special tokens and ids unknown to the tokenizer have no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend; "
                "the checkpoint needs a tokenizer.json"
            )
        self._backend = backend
        self.skip_special_tokens = skip_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        byte_level = type(self._backend.decoder).__name__ == "ByteLevel"
        self._byte_of_char = _byte_of_char() if byte_level else {}
        self._bytes_of_id: dict[int, bytes] = {}

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A fresh detokenizer for output that follows `prompt_ids`."""
        if self._byte_of_char:
            return _ByteDetokenizer(self)
        return _WindowDetokenizer(self, prompt_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=self.skip_special_tokens)

    def skips(self, token_id: int) -> bool:
        return self.skip_special_tokens and token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token, special or not; it may be half a character."""
        found = self._bytes_of_id.get(token_id)
        if found is None:
            found = self._bytes_of_id[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """A token by itself, for log-probabilities; broken characters are U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _compute_bytes(self, token_id: int) -> bytes:
        if not self._byte_of_char:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            return bytes(token.encode())


class _ByteDetokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if self._vocabulary.skips(token_id):
            return ""
        return self._utf8.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes `ids[start:]` and returns what is new; the window moves when its text is whole."""

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = [i for i in prompt_ids[-_CONTEXT_TOKENS:] if not vocabulary.skips(i)]
        self._read = len(self._window)
        """Tokens of the window whose text has been returned."""
        self._read_text = vocabulary.decode(self._window)

    def push(self, token_id: int) -> str:
        if self._vocabulary.skips(token_id):
            return ""
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._read_text):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._vocabulary.decode(self._window))

    def _advance(self, text: str) -> str:
        new_text = text[len(self._read_text) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._read_text = self._vocabulary.decode(self._window)
        return new_text


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for chars from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}
