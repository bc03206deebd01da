"""`/tokenize` and `/detokenize`, as vLLM has them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from revivemoe.server.bodies import read_generation, read_json
from revivemoe.server.described import body, errors
from revivemoe.server.errors import Json
from revivemoe.server.fields import acted_upon
from revivemoe.server.openai_routes import Generation
from revivemoe.server.prompts import check_vocabulary
from revivemoe.server.schema import INTEGERS, Conversation, Strict, at_most, validate

MAX_TOKENS = 1 << 20
_INLINE_TOKENS = 2048
"""More are looked up in a thread, so that it does not hold up everybody's streams."""
T = TypeVar("T")


class TokenizeText(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    model: str | None = None
    return_token_strs: bool = False


class Detokenize(Strict):
    model: str | None = None
    tokens: Annotated[
        list[int], Field(max_length=MAX_TOKENS, fail_fast=True), INTEGERS, at_most(MAX_TOKENS)
    ]


def token_routes(generation: Generation, guard: Callable[[Request], Awaitable[None]]) -> APIRouter:
    """What a prompt is in tokens, and tokens in text."""
    router = APIRouter(tags=["tokens"], dependencies=[Depends(guard)], responses=errors())
    model, encoder, vocabulary = generation.engine.model, generation.encoder, generation.vocabulary

    def names(ids: Sequence[int]) -> list[str]:
        return [vocabulary.token(i) or "" for i in ids]

    def text_of(ids: Sequence[int]) -> str:
        return vocabulary.decode(ids, skip_special_tokens=False)

    @router.post("/tokenize", openapi_extra=body(TokenizeText, TokenizeChat, generation=True))
    async def tokenize(request: Request) -> Response:
        document = await read_json(request)
        kind: type[TokenizeChat | TokenizeText]
        kind = TokenizeChat if "messages" in document else TokenizeText
        form = validate(kind, acted_upon(document, kind.model_fields))
        generation.check_model(form.model)
        if isinstance(form, TokenizeChat):
            ids = await encoder.conversation(form)
        else:
            ids = await encoder.encode(form.prompt, form.add_special_tokens)
        strings = await _aside(names, ids) if form.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": model.max_model_len}
        return Json({**answer, "tokens": ids, "token_strs": strings})

    @router.post("/detokenize", openapi_extra=body(Detokenize, generation=True))
    async def detokenize(request: Request) -> Response:
        form = await read_generation(request, Detokenize)
        generation.check_model(form.model)
        check_vocabulary(form.tokens, model.vocab_size, "tokens")
        return Json({"prompt": await _aside(text_of, form.tokens)})

    return router


async def _aside(work: Callable[[Sequence[int]], T], ids: Sequence[int]) -> T:
    if len(ids) <= _INLINE_TOKENS:
        return work(ids)
    return await asyncio.to_thread(work, ids)
