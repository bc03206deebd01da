"""`/tokenize` and `/detokenize`, as vLLM has them."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from revivemoe.server.aside import aside
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

    def told(ids: Sequence[int], strings: bool) -> Json:
        names = [vocabulary.token(i) or "" for i in ids] if strings else None
        counts: dict[str, object] = {"count": len(ids), "max_model_len": model.max_model_len}
        return Json({**counts, "tokens": ids, "token_strs": names})

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
        return await aside(partial(told, ids, form.return_token_strs), len(ids), _INLINE_TOKENS)

    @router.post("/detokenize", openapi_extra=body(Detokenize, generation=True))
    async def detokenize(request: Request) -> Response:
        form = await read_generation(request, Detokenize)
        generation.check_model(form.model)
        check_vocabulary(form.tokens, model.vocab_size, "tokens")
        decode = partial(vocabulary.decode, form.tokens, skip_special_tokens=False)
        return Json({"prompt": await aside(decode, len(form.tokens), _INLINE_TOKENS)})

    return router
