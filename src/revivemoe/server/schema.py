"""The bodies of completion requests, checked strictly: no coercion, no unknown field."""

import json
import re
from typing import Annotated, Literal, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from revivemoe.server.errors import ApiError
from revivemoe.server.fields import acted_upon, hint

MAX_BODY_BYTES = 32 << 20
MAX_LOGPROBS = 20
MAX_N = 128
MAX_BIASES = 4096
_DIGITS = re.compile("[0-9]{1,10}")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_INT64 = 1 << 63

M = TypeVar("M", bound=BaseModel)

StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _integral(value: object) -> object:
    """2.0 is an integer: some clients know but one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token_bias(value: object) -> object:
    """JSON has strings for keys."""
    if not isinstance(value, dict):
        return value
    return {
        int(k) if isinstance(k, str) and _DIGITS.fullmatch(k) else k: v for k, v in value.items()
    }


_Integral = BeforeValidator(_integral)
Int = Annotated[int, _Integral]
Count = Annotated[int, Field(ge=0), _Integral]
CountOrAll = Annotated[int, Field(ge=-1), _Integral]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64), _Integral]
Bias = Annotated[dict[Int, float], BeforeValidator(_token_bias)]


_TEXTS_OR_IDS = [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "string"}},
    {"type": "array", "minItems": 1, "items": {"type": "integer"}},
]
Prompt = Annotated[
    object,
    WithJsonSchema({"anyOf": [*_TEXTS_OR_IDS, {"type": "array", "items": _TEXTS_OR_IDS[2]}]}),
]
"""Text, token ids, or a list of either."""


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted without effect: nothing is padded."""
    continuous_usage_stats: bool = False


class GenerationRequest(Strict):
    """What both endpoints share. Names and defaults as in OpenAI's API, then vLLM's.

    None: the default of the server (`streams.SamplingDefaults`).
    """

    model: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Int = Field(1, ge=1, le=MAX_N)
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: CountOrAll | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[list[StopString], BeforeValidator(_listed)] = Field([], max_length=16)
    stop_token_ids: list[Int] = Field([], max_length=256)
    include_stop_str_in_output: bool = False
    max_completion_tokens: Count | None = None
    min_tokens: Int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Bias = Field({}, max_length=MAX_BIASES)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: CountOrAll | None = None
    truncation_side: Literal["left", "right"] = "left"
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        """A last chunk tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Every chunk does."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    """See `prompts.prompt_items`."""
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Integral] | None = None
    echo: bool = False
    add_special_tokens: bool = True


class Conversation(Strict):
    """How messages become a prompt."""

    messages: list[dict[str, object]] = Field(min_length=1)
    add_special_tokens: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = {}
    documents: list[dict[str, object]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class ChatRequest(Conversation, GenerationRequest):
    max_tokens: Annotated[int, Field(ge=1), _Integral] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), _Integral] | None = None
    logprobs: bool = False
    top_logprobs: Int = Field(0, ge=0, le=MAX_LOGPROBS)
    echo: bool = False


async def read_json(request: Request) -> dict[str, object]:
    """The body as a JSON object. Raises ApiError."""
    body = await _read_body(request)
    try:
        text = body.decode()
        document = json.loads(text, object_pairs_hook=_no_duplicates)
        if _ESCAPED_SURROGATE.search(text):
            _check_unicode(document)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: {error.reason}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {brief(twice)} occurs twice in one object")
    return found


def _check_unicode(value: object) -> None:
    """Raises ValueError for half of a surrogate pair, anywhere."""
    match value:
        case str():
            if any("\ud800" <= char <= "\udfff" for char in value):
                raise ValueError("a string holds a lone surrogate, which is not Unicode")
        case dict():
            for name, inner in value.items():
                _check_unicode(name)
                _check_unicode(inner)
        case list():
            for inner in value:
                _check_unicode(inner)


async def read_generation(request: Request, form: type[M]) -> M:
    return validate(form, acted_upon(await read_json(request)))


def validate(form: type[M], document: dict[str, object]) -> M:
    """Raises ApiError that names the first wrong field, what is allowed and what was given."""
    try:
        return form.model_validate(document)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False)[0]
    field = shortened(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        message = f"unknown field `{field}`{hint(field)}"
        raise ApiError(message, param=field, code="unknown_parameter")
    if error["type"] == "missing":
        raise ApiError(f"`{field}` is required", param=field, code="missing_required_parameter")
    raise ApiError(f"`{field}`: {error['msg']}, got {brief(error['input'])}", param=field)


async def _read_body(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ApiError(f"the body is longer than {MAX_BODY_BYTES} bytes", 413)
        chunks.append(chunk)
    return b"".join(chunks)


def brief(value: object) -> str:
    """A value as an error message may hold it."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
