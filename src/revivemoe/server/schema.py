"""The bodies of completion requests, checked strictly: no coercion, no unknown field."""

import json
from typing import Annotated, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from revivemoe.server.errors import ApiError
from revivemoe.server.fields import acted_upon

MAX_BODY_BYTES = 32 << 20
MAX_LOGPROBS = 20
MAX_N = 128
_INT64 = 1 << 63

M = TypeVar("M", bound=BaseModel)

StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationRequest(Strict):
    """What both endpoints share. Names and defaults as in OpenAI's API, then vLLM's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: Annotated[list[StopString], BeforeValidator(_listed)] = Field([], max_length=16)
    stop_token_ids: list[int] = Field([], max_length=256)
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    return_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    prompt: object
    """Text, token ids, or a list of either; see prompts.py."""
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest):
    messages: list[dict[str, object]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    add_special_tokens: bool = False


async def read_json(request: Request) -> dict[str, object]:
    """The body as a JSON object. Raises ApiError."""
    body = await _read_body(request)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return document


async def read_generation(request: Request, form: type[M]) -> M:
    return validate(form, acted_upon(await read_json(request)))


def validate(form: type[M], document: dict[str, object]) -> M:
    """Raises ApiError that names the first wrong field, what is allowed and what was given."""
    try:
        return form.model_validate(document)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        raise ApiError(f"unknown field `{field}`", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        raise ApiError(f"`{field}` is required", param=field, code="missing_required_parameter")
    raise ApiError(f"`{field}`: {error['msg']}, got {_brief(error['input'])}", param=field)


async def _read_body(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ApiError(f"the body is longer than {MAX_BODY_BYTES} bytes", 413)
        chunks.append(chunk)
    return b"".join(chunks)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
