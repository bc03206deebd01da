"""OpenAI's endpoints."""

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import PurePath

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from revivemoe.detokenizer import Vocabulary
from revivemoe.server.admission import HEADERS_WITHIN_S, Admission
from revivemoe.server.bodies import read_generation
from revivemoe.server.brief import shortened
from revivemoe.server.chat import ChatShape
from revivemoe.server.completions import CompletionShape
from revivemoe.server.described import body, errors
from revivemoe.server.errors import ApiError
from revivemoe.server.lifetime import Lifetime
from revivemoe.server.prompts import PromptEncoder
from revivemoe.server.reply import Reply, Shape
from revivemoe.server.sampling import chat_submission, completion_submission, wanted_tokens
from revivemoe.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from revivemoe.server.sse import DONE, EventStream
from revivemoe.streams import ServingEngine, Submission


@dataclass(frozen=True)
class Generation:
    engine: ServingEngine
    encoder: PromptEncoder
    vocabulary: Vocabulary
    lifetime: Lifetime

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        self.lifetime.check_open()
        form = await read_generation(request, CompletionRequest)
        self.check_model(form.model)
        prompts = await self.lifetime.run(request.receive, self.encoder.completion(form))
        name = _request_id("cmpl", form, request)
        submission = completion_submission(name, form, prompts, self.engine.model)
        nothing = wanted_tokens(form) == 0
        shape = CompletionShape(form, submission, self.vocabulary, prompt_only=nothing)
        return await self._answer(request, form, submission, shape, discard_output=nothing)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self.lifetime.check_open()
        form = await read_generation(request, ChatRequest)
        self.check_model(form.model)
        prompt = await self.lifetime.run(request.receive, self.encoder.chat(form))
        name = _request_id("chatcmpl", form, request)
        submission = chat_submission(name, form, prompt, self.engine.model)
        shape = ChatShape(form, submission, self.vocabulary)
        return await self._answer(request, form, submission, shape)

    def check_model(self, name: str | None) -> None:
        """None and "" mean the one there is, and so does its directory, which is vLLM's name."""
        model = self.engine.model
        if name and name != model.name and str(PurePath(name)) != model.model_dir:
            raise ApiError(
                f"the model `{shortened(name)}` does not exist; this server has `{model.name}`",
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
            usage = (form.include_usage, form.continuous_usage)
            return Reply(submission, stream, shape, name, *usage, discard_output)

        async def answer() -> Response:
            return await (await submit()).response()

        if not form.stream:
            return await self.lifetime.run(request.receive, answer())
        return await self._stream(request, Admission(submit))

    async def _stream(self, request: Request, admission: "Admission") -> Response:
        """Its headers go out at once, also while the instance recovers."""
        try:
            await self.lifetime.run(request.receive, admission.settle(HEADERS_WITHIN_S))
        except BaseException:
            admission.close()
            raise
        return EventStream(
            admission.events(), self.lifetime, admission.close, admission.headers, last=DONE
        )


def openai_routes(generation: Generation, guard: Callable[[Request], Awaitable[None]]) -> APIRouter:
    router = APIRouter(
        prefix="/v1", tags=["openai"], dependencies=[Depends(guard)], responses=errors()
    )
    text, chat = (body(form, generation=True) for form in (CompletionRequest, ChatRequest))
    router.post("/completions", openapi_extra=text)(generation.complete)
    router.post("/chat/completions", openapi_extra=chat)(generation.chat)
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
    @router.get("/models/", include_in_schema=False)
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        generation.check_model(name)
        return card

    return router


def _request_id(prefix: str, form: GenerationRequest, request: Request) -> str:
    """The caller's own, from the header or the field (as in vLLM), or a new one."""
    given = request.headers.get("x-request-id", "")
    if not (0 < len(given) <= 256 and given.isascii() and given.isprintable()):
        given = form.request_id or uuid.uuid4().hex
    return f"{prefix}-{given}"
