"""`/tokenize` and `/detokenize`, as vLLM has them."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from revivemoe.server.described import body, errors
from revivemoe.server.errors import ApiError, Json
from revivemoe.server.openai_routes import Generation
from revivemoe.server.prompts import check_vocabulary
from revivemoe.server.schema import Conversation, Int, Strict, read_json, validate

MAX_TOKENS = 1 << 20


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
    tokens: list[Int]


def token_routes(generation: Generation, guard: Callable[[Request], Awaitable[None]]) -> APIRouter:
    """What a prompt is in tokens, and tokens in text."""
    router = APIRouter(tags=["tokens"], dependencies=[Depends(guard)], responses=errors())
    model, encoder, vocabulary = generation.engine.model, generation.encoder, generation.vocabulary

    @router.post("/tokenize", openapi_extra=body(TokenizeText, TokenizeChat))
    async def tokenize(request: Request) -> Response:
        document = {k: v for k, v in (await read_json(request)).items() if v is not None}
        if "messages" in document:
            chat = validate(TokenizeChat, document)
            generation.check_model(chat.model)
            ids, strings = await encoder.conversation(chat), chat.return_token_strs
        else:
            text = validate(TokenizeText, document)
            generation.check_model(text.model)
            ids = await encoder.encode(text.prompt, text.add_special_tokens)
            strings = text.return_token_strs
        answer: dict[str, object] = {"count": len(ids), "max_model_len": model.max_model_len}
        names = [vocabulary.token(i) or "" for i in ids] if strings else None
        return Json({**answer, "tokens": ids, "token_strs": names})

    @router.post("/detokenize", openapi_extra=body(Detokenize))
    async def detokenize(request: Request) -> Response:
        form = validate(Detokenize, await read_json(request))
        generation.check_model(form.model)
        if len(form.tokens) > MAX_TOKENS:
            raise ApiError(f"`tokens`: at most {MAX_TOKENS} of them", param="tokens")
        check_vocabulary(form.tokens, model.vocab_size, "tokens")
        text = vocabulary.decode(form.tokens, skip_special_tokens=False)
        return Json({"prompt": text})

    return router
