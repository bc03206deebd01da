"""Token ids to text, one token at a time: what a token adds, in characters and in bytes.

Every tokenizer that serves language models spells a token as fixed bytes: byte-level ones by
GPT-2's alphabet, sentencepiece ones by their pieces and a token for each byte. So a text is the
bytes of its tokens through an incremental UTF-8 decoder: bounded work per token, and the same text
however it is cut. What is no UTF-8 reads U+FFFD.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from revivemoe.streams import Piece

if TYPE_CHECKING:
    from tokenizers import AddedToken

REPLACEMENT = "\ufffd"
_LONGEST = 4
"""Bytes of a character, at most."""
_SAMPLE = (*range(512), *range(512, 1 << 17, 509))
"""Ids that are tried at the start."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(Protocol):
    """What is used of a `tokenizers` decoder."""

    def decode(self, tokens: list[str]) -> str: ...


class Backend(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    decoder: Decoder | None

    def id_to_token(self, id: int) -> str | None: ...
    def get_added_tokens_decoder(self) -> "Mapping[int, AddedToken]": ...


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of `transformers`."""

    @property
    def backend_tokenizer(self) -> Backend: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(
        self, conversation: list[dict[str, object]], **options: object
    ) -> object: ...


class Detokenizer(Protocol):
    """The text of one choice. Never returns part of a character."""

    @property
    def open_bytes(self) -> bytes:
        """Those of a character that is not whole yet."""

    def push(self, token_id: int) -> Piece:
        """What this token adds."""

    def flush(self) -> str:
        """What is still held back, broken characters replaced by U+FFFD. Once, at the end."""


class Vocabulary:
    """What the detokenizers of one tokenizer share. Ids unknown to the tokenizer have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend; "
                "the checkpoint needs a tokenizer.json"
            )
        added = backend.get_added_tokens_decoder()
        self.specials: Mapping[int, str] = {i: t.content for i, t in added.items() if t.special}
        """Text of each special token."""
        self._special_ids = frozenset(self.specials)
        self._backend = backend
        self._spelling = _Spelling(backend.decoder)
        self._bytes_of_id: dict[int, bytes] = {}
        self._check([i for i in _SAMPLE if i not in added])

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh detokenizer for output that follows `prompt_ids`."""
        hidden: frozenset[int] = self._special_ids if skip_special_tokens else frozenset()
        at_start = all(i in hidden or self.token(i) is None for i in prompt_ids)
        return _Pieces(self, hidden, at_start, self.open_bytes(prompt_ids, skip_special_tokens))

    def open_bytes(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> bytes:
        """Those of a character that these tokens begin and do not end."""
        raw, hidden = b"", self._special_ids if skip_special_tokens else frozenset()
        for token_id in reversed(token_ids):
            if token_id not in hidden:
                raw = self.token_bytes(token_id) + raw
            if len(raw) >= _LONGEST:
                break
        return open_end(raw)

    def pieces(
        self, token_ids: Sequence[int], skip_special_tokens: bool = True, whole: bool = True
    ) -> list[Piece]:
        """Those of a text, whose `text`s join to it. Unless it is the `whole` one, what follows
        may end its last character.
        """
        detokenizer = self.detokenizer((), skip_special_tokens)
        pieces = [detokenizer.push(i) for i in token_ids]
        if pieces and whole and (rest := detokenizer.flush()):
            pieces[-1] = Piece(pieces[-1].text + rest, pieces[-1].raw)
        return pieces

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces(token_ids, skip_special_tokens))

    def _check(self, token_ids: Sequence[int]) -> None:
        """Raises ValueError for a decoder that spells a token by what stands around it."""
        known = [i for i in token_ids if self.token(i) is not None]
        around = [*known, *reversed(known)]
        for few in zip(around, around[1:], around[2:], strict=False):
            theirs = self._spelling.decode([self.token(i) or "" for i in few])
            if REPLACEMENT not in theirs and theirs != self.decode(few):
                raise ValueError(
                    "the decoder of tokenizer.json spells tokens by their neighbours, which is not "
                    f"supported: {theirs!r} would be {self.decode(few)!r} token by token"
                )

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token within a text, special or not; it may be half a character."""
        found = self._bytes_of_id.get(token_id)
        if found is None:
            token = self.token(token_id)
            found = b"" if token is None else self._spelling.raw(token)
            self._bytes_of_id[token_id] = found
        return found

    def first_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token that a text begins with: some lose their space there."""
        token = self.token(token_id)
        return b"" if token is None else self._spelling.first(token)

    def token(self, token_id: int) -> str | None:
        """As the tokenizer's files spell it; None if there is none of that id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def token_text(self, token_id: int) -> str:
        """A token by itself. One that is no text reads `bytes:\\xe2\\x82`, as in OpenAI's API."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Spelling:
    """How a tokenizer's tokens stand for bytes, found out by asking its decoder."""

    def __init__(self, decoder: Decoder | None) -> None:
        self.decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
        self._alphabet = _byte_of_char() if self.decode(["\u0120"]) == " " else {}
        self._has_bytes = self.decode(["<0x41>"]) == "A"
        self._anchor = self.decode(["a"])

    def raw(self, token: str) -> bytes:
        """Bytes of a token that follows another one."""
        if (byte := self._byte(token)) is not None:
            return byte
        if self._alphabet:
            return self._by_alphabet(token)
        return self.decode(["a", token])[len(self._anchor) :].encode()

    def first(self, token: str) -> bytes:
        """Bytes of a token that a text begins with."""
        if (byte := self._byte(token)) is not None:
            return byte if byte >= b"\x80" else self.decode([token]).encode()
        return self._by_alphabet(token) if self._alphabet else self.decode([token]).encode()

    def _byte(self, token: str) -> bytes | None:
        found = _BYTE.fullmatch(token) if self._has_bytes else None
        return None if found is None else bytes([int(found[1], 16)])

    def _by_alphabet(self, token: str) -> bytes:
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            return token.encode()


class _Pieces:
    def __init__(
        self, vocabulary: Vocabulary, hidden: frozenset[int], at_start: bool, open_bytes: bytes
    ) -> None:
        self._vocabulary, self._hidden, self._at_start = vocabulary, hidden, at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.decode(open_bytes)

    @property
    def open_bytes(self) -> bytes:
        return self._utf8.getstate()[0]

    def push(self, token_id: int) -> Piece:
        if token_id in self._hidden:
            return Piece("", b"")
        spell = self._vocabulary.first_bytes if self._at_start else self._vocabulary.token_bytes
        raw = spell(token_id)
        if self._at_start and self._vocabulary.token(token_id) is not None:
            self._at_start = False
        return Piece(self._utf8.decode(raw), raw)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def ends_in_a_character(piece: Piece) -> bool:
    """Whether nothing that follows can add to the last character of a token."""
    return (bool(piece.text) or not piece.raw) and not open_end(piece.raw)


def open_end(raw: bytes) -> bytes:
    """The bytes at the end that begin a character and do not end it."""
    for start in range(len(raw) - 1, max(-1, len(raw) - _LONGEST), -1):
        end = raw[start:]
        if end[0] >= 0xC0:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return end if decoder.decode(end) == "" else b""
    return b""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for chars from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}
