"""From what a request says to token ids: tokenising, chat template, limits."""

from collections.abc import Sequence
from functools import partial

from revivemoe.detokenizer import Tokenizer
from revivemoe.server.aside import aside
from revivemoe.server.errors import ApiError
from revivemoe.server.schema import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    GenerationRequest,
    brief,
)
from revivemoe.server.template import ChatTemplate, weight
from revivemoe.streams import ModelInfo

MAX_CHOICES = 1024
"""Prompts times n of one request."""
_INLINE_CHARS = 4096
"""Of a request; what is longer is rendered and tokenised in a thread."""
_MAX_CHARS = 1 << 22
"""Of a text that is tokenised as a whole: each may be a token of hundreds of bytes in memory."""
_CHARS_PER_TOKEN = 16
"""More than text has: the first part of a text that is far too long is enough to know it."""
TokenIds = tuple[int, ...]


class PromptEncoder:
    def __init__(
        self, tokenizer: Tokenizer, model: ModelInfo, chat_template: str | None = None
    ) -> None:
        """`chat_template`: another one than the tokenizer's own."""
        self._tokenizer, self._model = tokenizer, model
        self._template = ChatTemplate(tokenizer, chat_template)

    async def completion(self, form: CompletionRequest) -> tuple[TokenIds, ...]:
        """Token ids of each prompt of a completion request. Raises ApiError.

        One that is only looked at (`echo`) may be as long as the context.
        """
        items, room = prompt_items(form.prompt), 0 if form.echo else 1

        def encoded() -> tuple[TokenIds, ...]:
            special = form.add_special_tokens
            return tuple(self._prompt(item, special, form, "prompt", room) for item in items)

        return await aside(encoded, sum(map(len, items)), _INLINE_CHARS)

    async def chat(self, form: ChatRequest) -> TokenIds:
        """Token ids of a conversation up to where the assistant's turn begins. Raises ApiError."""

        def encoded() -> TokenIds:
            text = self._template.render(form)
            return self._prompt(text, form.add_special_tokens, form, "messages", 1)

        return await aside(encoded, weight(form, _INLINE_CHARS), _INLINE_CHARS)

    async def conversation(self, form: Conversation) -> list[int]:
        """Token ids of a conversation, however many. Raises ApiError."""

        def encoded() -> list[int]:
            return self._encode_now(self._template.render(form), form.add_special_tokens)

        return await aside(encoded, weight(form, _INLINE_CHARS), _INLINE_CHARS)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, however many."""
        encoded = partial(self._encode_now, text, add_special_tokens)
        return await aside(encoded, len(text), _INLINE_CHARS)

    def _encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        most = max(_MAX_CHARS, _CHARS_PER_TOKEN * self._model.max_model_len)
        if len(text) > most:
            raise ApiError(f"a text of {len(text)} characters is too long: at most {most}")
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _prompt(
        self,
        item: str | list[int],
        add_special_tokens: bool,
        form: GenerationRequest,
        field: str,
        room: int,
    ) -> TokenIds:
        """Token ids of a prompt, cut as `form` says. `room`: tokens that must be left in the
        context. Raises ApiError.
        """
        keep = self._kept(form)
        from_end = keep is not None and form.truncation_side == "left"
        ids, whole = item, True
        if isinstance(ids, str):
            ids, whole = self._bounded(ids, add_special_tokens, keep)
        if keep is not None and len(ids) > keep:
            return self._checked(ids[len(ids) - keep :] if from_end else ids[:keep], field, room)
        if not whole:
            raise self._too_long(f"at least {len(ids) // 2}", field)
        return self._checked(ids, field, room)

    def _kept(self, form: GenerationRequest) -> int | None:
        """`truncate_prompt_tokens`: the last so many (or first); -1: as many as fit."""
        keep = form.truncate_prompt_tokens
        return self._model.max_model_len - 1 if keep is not None and keep < 0 else keep

    def _bounded(
        self, text: str, add_special_tokens: bool, keep: int | None
    ) -> tuple[list[int], bool]:
        """Token ids of a text, and whether of all of it: to refuse one that is far too long, its
        beginning does. A text of which some is kept is taken as a whole: what its last tokens are
        hangs on its first (digits by three).

        No number of characters bounds a token: tokenizers drop, merge and eat them. But a part has
        the tokens that the text has there, except for a few where it is cut. So what makes more
        than twice as many as the context has says enough.
        """
        most = self._model.max_model_len
        chars = _INLINE_CHARS + _CHARS_PER_TOKEN * most
        while keep is None and chars < len(text):
            ids = self._encode_now(text[:chars], add_special_tokens)
            if len(ids) > 2 * most + 1:
                return ids, False
            chars *= 4
        return self._encode_now(text, add_special_tokens), True

    def _checked(self, ids: Sequence[int], field: str, room: int) -> TokenIds:
        if not ids:
            raise ApiError("the prompt is empty: it needs at least one token", param=field)
        if len(ids) + room > self._model.max_model_len:
            raise self._too_long(f"{len(ids)}", field)
        check_vocabulary(ids, self._model.vocab_size, field)
        return tuple(ids)

    def _too_long(self, count: str, field: str) -> ApiError:
        """In the words of OpenAI, vLLM and Anthropic, by which clients know that they should
        shorten what they send.
        """
        limit = self._model.max_model_len
        no_room = " and leaves no room for output" if count == str(limit) else ""
        return ApiError(
            f"This model's maximum context length is {limit} tokens. However, your request has "
            f"{count} input tokens{no_room}: the prompt is too long. Please reduce the length of "
            f"the input {field}.",
            param=field,
            code="context_length_exceeded",
        )


def check_vocabulary(ids: Sequence[int], vocab_size: int, field: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ApiError(
            f"`{field}`: token id {brief(wrong)} is outside the vocabulary (0 to {vocab_size - 1})",
            param=field,
        )


def prompt_items(prompt: object) -> list[str | list[int]]:
    """One entry for each prompt: text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if not prompt:
            raise ApiError("`prompt` is an empty list", param="prompt")
        if (ids := _ids(prompt)) is not None:
            return [ids]
        if len(prompt) > MAX_CHOICES:
            raise ApiError(
                f"`prompt`: at most {MAX_CHOICES} prompts, got {len(prompt)}", param="prompt"
            )
        if all(isinstance(item, str) for item in prompt):
            return prompt
        lists = [_ids(item) for item in prompt]
        if all(ids is not None for ids in lists):
            return [ids for ids in lists if ids is not None]
    raise ApiError(
        "`prompt` must be a string, a list of strings, a list of token ids or a list of such lists",
        param="prompt",
    )


def _ids(value: object) -> list[int] | None:
    """Token ids, if they are: integers, also as 2.0, as in all fields of a request."""
    if not isinstance(value, list):
        return None
    kinds = set(map(type, value))
    if kinds <= {int}:
        return value
    if kinds <= {int, float} and all(i.is_integer() for i in value if type(i) is float):
        return [int(i) for i in value]
    return None
