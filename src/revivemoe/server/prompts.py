"""From what a request says to token ids: tokenising, chat template, limits."""

import asyncio
from collections.abc import Sequence

from revivemoe.detokenizer import Tokenizer
from revivemoe.server.errors import ApiError
from revivemoe.server.schema import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    GenerationRequest,
    brief,
)
from revivemoe.server.template import ChatTemplate
from revivemoe.streams import ModelInfo

MAX_CHOICES = 1024
"""Prompts times n of one request."""
_INLINE_CHARS = 4096
"""Longer text is tokenised in a thread, so that it does not hold up everybody's streams."""
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
        encoded = [
            await self.encode(item, form.add_special_tokens) if isinstance(item, str) else item
            for item in prompt_items(form.prompt)
        ]
        room = 0 if form.echo else 1
        return tuple(self._checked(self._cut(ids, form), "prompt", room) for ids in encoded)

    async def chat(self, form: ChatRequest) -> TokenIds:
        """Token ids of a conversation up to where the assistant's turn begins. Raises ApiError."""
        return self._checked(self._cut(await self.conversation(form), form), "messages", 1)

    async def conversation(self, form: Conversation) -> list[int]:
        """Token ids of a conversation, however many. Raises ApiError."""
        return await self.encode(self._template.render(form), form.add_special_tokens)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, however many."""
        if len(text) <= _INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _cut(self, ids: Sequence[int], form: GenerationRequest) -> Sequence[int]:
        """`truncate_prompt_tokens`: the last so many (or first); -1: as many as fit."""
        most = form.truncate_prompt_tokens
        if most is None:
            return ids
        if most < 0:
            most = self._model.max_model_len - 1
        if len(ids) <= most:
            return ids
        return ids[:most] if form.truncation_side == "right" else ids[len(ids) - most :]

    def _checked(self, ids: Sequence[int], field: str, room: int) -> TokenIds:
        """`room`: tokens that must be left in the context."""
        if not ids:
            raise ApiError("the prompt is empty: it needs at least one token", param=field)
        limit = self._model.max_model_len
        if len(ids) + room > limit:
            raise ApiError(
                # vLLM's and Anthropic's words: litellm and langchain know an overflow by them.
                f"This model's maximum context length is {limit} tokens, prompt and output "
                f"together. However, your request has {len(ids)} input tokens: the prompt is too "
                "long",
                param=field,
                code="context_length_exceeded",
            )
        check_vocabulary(ids, self._model.vocab_size, field)
        return tuple(ids)


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
