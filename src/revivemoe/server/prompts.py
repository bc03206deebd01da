"""From what a request says to token ids: tokenising, chat template, limits."""

import asyncio
from collections.abc import Sequence

from jinja2 import TemplateError

from revivemoe.detokenizer import Tokenizer
from revivemoe.server.errors import ApiError
from revivemoe.streams import ModelInfo

MAX_CHOICES = 1024
"""Prompts times n of one request."""
_INLINE_CHARS = 4096
"""Longer text is tokenised in a thread, so that it does not hold up everybody's streams."""
_ROLES = ("system", "developer", "user", "assistant")
_MESSAGE_FIELDS = frozenset({"role", "content", "name"})

TokenIds = tuple[int, ...]


class PromptEncoder:
    def __init__(self, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._model = model

    async def completion(self, prompt: object, add_special_tokens: bool) -> tuple[TokenIds, ...]:
        """Token ids of each prompt of a completion request. Raises ApiError."""
        encoded = [
            await self._encode(item, add_special_tokens) if isinstance(item, str) else item
            for item in prompt_items(prompt)
        ]
        return tuple(self._checked(ids, "prompt") for ids in encoded)

    async def chat(self, messages: list[dict[str, object]], add_special_tokens: bool) -> TokenIds:
        """Token ids of a conversation up to where the assistant's turn begins. Raises ApiError."""
        plain = [_message(k, message) for k, message in enumerate(messages)]
        text = self._render(plain)
        return self._checked(await self._encode(text, add_special_tokens), "messages")

    def _render(self, messages: list[dict[str, object]]) -> str:
        if not self._tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template: use /v1/completions", code="no_chat_template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ApiError(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        return str(text)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ApiError("the text holds a lone surrogate, which is not Unicode", param="prompt")
        if len(text) <= _INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _checked(self, ids: Sequence[int], field: str) -> TokenIds:
        if not ids:
            raise ApiError("the prompt is empty: it needs at least one token", param=field)
        limit = self._model.max_model_len
        if len(ids) >= limit:
            raise ApiError(
                f"the prompt has {len(ids)} tokens, but this model's context is {limit} tokens "
                "for prompt and output together",
                param=field,
                code="context_length_exceeded",
            )
        check_vocabulary(ids, self._model.vocab_size, field)
        return tuple(ids)


def check_vocabulary(ids: Sequence[int], vocab_size: int, field: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ApiError(
            f"`{field}`: token id {wrong} is outside the vocabulary (0 to {vocab_size - 1})",
            param=field,
        )


def prompt_items(prompt: object) -> list[str | list[int]]:
    """One entry for each prompt: text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if not prompt:
            raise ApiError("`prompt` is an empty list", param="prompt")
        if _is_ids(prompt):
            return [prompt]
        if len(prompt) > MAX_CHOICES:
            raise ApiError(
                f"`prompt`: at most {MAX_CHOICES} prompts, got {len(prompt)}", param="prompt"
            )
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) and _is_ids(item) for item in prompt):
            return prompt
    raise ApiError(
        "`prompt` must be a string, a list of strings, a list of token ids or a list of such lists",
        param="prompt",
    )


def _is_ids(value: list[object]) -> bool:
    return all(type(item) is int for item in value)


def _message(position: int, message: dict[str, object]) -> dict[str, object]:
    """A message with its content as one string. Raises ApiError naming what is not supported."""
    where = f"messages.{position}"
    given = {name: value for name, value in message.items() if value not in (None, [])}
    for name in given.keys() - _MESSAGE_FIELDS:
        raise ApiError(f"`{where}.{name}` is not supported by this server", param=f"{where}.{name}")
    if given.get("role") not in _ROLES:
        raise ApiError(
            f"`{where}.role` must be one of {', '.join(_ROLES)}, got {given.get('role')!r}",
            param=f"{where}.role",
        )
    return {**given, "content": _text(f"{where}.content", given.get("content"))}


def _text(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"`{where}` must be a string or a list of text parts", param=where)
    return "\n".join(_part(f"{where}.{k}", part) for k, part in enumerate(content))


def _part(where: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ApiError(f"`{where}`: only text parts are supported, got {kind!r}", param=where)
