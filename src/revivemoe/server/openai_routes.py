"""OpenAI's endpoints."""

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from revivemoe.detokenizer import Vocabulary
from revivemoe.server.chat import ChatShape
from revivemoe.server.completions import CompletionShape
from revivemoe.server.errors import ApiError
from revivemoe.server.lifetime import Lifetime
from revivemoe.server.prompts import PromptEncoder, prompt_items
from revivemoe.server.reply import Reply, Shape
from revivemoe.server.sampling import chat_submission, completion_submission
from revivemoe.server.schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    read_generation,
)
from revivemoe.server.sse import EventStream
from revivemoe.streams import ServingEngine, Submission


@dataclass(frozen=True)
class Generation:
    engine: ServingEngine
    encoder: PromptEncoder
    vocabulary: Vocabulary
    lifetime: Lifetime

    async def complete(self, request: Request) -> Response:
        form = await read_generation(request, CompletionRequest)
        self.check_model(form.model)
        prompts = await self.encoder.completion(form.prompt, form.add_special_tokens)
        submission = completion_submission(_new_id("cmpl"), form, prompts, self.engine.model)
        items, decode = prompt_items(form.prompt) if form.echo else [], self.vocabulary.decode
        echoes = [item if isinstance(item, str) else decode(item) for item in items]
        shape = CompletionShape(form, submission, echoes, self.vocabulary)
        return await self._answer(request, form, submission, shape, form.max_tokens == 0)

    async def chat(self, request: Request) -> Response:
        form = await read_generation(request, ChatRequest)
        self.check_model(form.model)
        prompt = await self.encoder.chat(form.messages, form.add_special_tokens)
        submission = chat_submission(_new_id("chatcmpl"), form, prompt, self.engine.model)
        shape = ChatShape(form, submission, self.vocabulary)
        return await self._answer(request, form, submission, shape)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.engine.model.name:
            raise ApiError(
                f"the model `{name}` does not exist; this server has `{self.engine.model.name}`",
                404,
                param="model",
                code="model_not_found",
            )

    async def _answer(
        self,
        request: Request,
        form: GenerationRequest,
        submission: Submission,
        shape: Shape,
        discard_output: bool = False,
    ) -> Response:
        if form.stream_options is not None and not form.stream:
            raise ApiError("`stream_options` needs `stream` to be true", param="stream_options")

        async def submit() -> Reply:
            stream, name = await self.engine.submit(submission), self.engine.model.name
            return Reply(submission, stream, shape, name, form.include_usage, discard_output)

        async def answer() -> Response:
            reply = await submit()
            return JSONResponse(await reply.body(), headers=reply.headers)

        if not form.stream:
            return await self.lifetime.run(request.receive, answer())
        reply = await self.lifetime.run(request.receive, submit())
        return EventStream(reply.events(), self.lifetime, reply.close, reply.headers)


def openai_routes(generation: Generation, guard: Callable[[Request], Awaitable[None]]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(guard)])
    router.post("/completions")(generation.complete)
    router.post("/chat/completions")(generation.chat)
    model_info = generation.engine.model
    card: dict[str, object] = {
        "id": model_info.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "revivemoe",
        "root": model_info.model_dir,
        "parent": None,
        "max_model_len": model_info.max_model_len,
    }

    @router.get("/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        generation.check_model(name)
        return card

    return router


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
