"""The bodies of completion requests, checked strictly: no coercion, no unknown field."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from revivemoe.server.brief import brief as brief
from revivemoe.server.brief import shortened
from revivemoe.server.errors import ApiError
from revivemoe.server.fields import hint, integral

MAX_LOGPROBS = 20
MAX_N = 1024
"""As many choices as a request may have over all of its prompts."""
MAX_BIASES = 4096
MAX_STOP_TOKENS = 1024
MAX_STOPS = 1024
MAX_STOP_CHARS = 1 << 14
MAX_STOP_STRING_CHARS = 1 << 10
"""What is held back of a text costs every token in proportion."""
"""Of all stop strings together: the matcher has a state for each, and makes them all at first."""
MAX_MESSAGES = 1 << 16
"""And documents. A message is some tokens at least: more are no conversation, only work."""
MAX_TEMPERATURE = 1e30
"""All draw evenly above that, and what is divided by it is a number still."""
_DIGITS = re.compile("[0-9]{1,10}")
_INT64 = 1 << 63

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, given: object) -> object:
        """An unknown name is told before anything else, and alone: there may be millions."""
        if isinstance(given, dict):
            for name in given:
                if name not in cls.model_fields:
                    return {name: None}
        return given


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _short_together(strings: list[str]) -> list[str]:
    if (length := sum(map(len, strings))) > MAX_STOP_CHARS:
        given = {"most": MAX_STOP_CHARS, "given": length}
        raise PydanticCustomError(
            "too_long", "at most {most} characters are allowed in all, not {given}", given
        )
    return strings


def _integers(value: object) -> object:
    if not isinstance(value, list):
        return value
    return [int(v) if type(v) is float and v.is_integer() else v for v in value]


def _token_bias(value: object) -> object:
    """JSON has strings for keys."""
    if not isinstance(value, dict):
        return value
    return {
        int(k) if isinstance(k, str) and _DIGITS.fullmatch(k) else k: v for k, v in value.items()
    }


def at_most(most: int) -> BeforeValidator:
    """Before any of it is looked at."""

    def few(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > most:
            given = {"most": most, "given": len(value)}
            raise PydanticCustomError("too_long", "at most {most} are allowed, not {given}", given)
        return value

    return BeforeValidator(few)


_Integral = BeforeValidator(integral)
Int = Annotated[int, _Integral]
Count = Annotated[int, Field(ge=0), _Integral]
CountOrAll = Annotated[int, Field(ge=-1), _Integral]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64), _Integral]
Bias = Annotated[dict[Int, float], BeforeValidator(_token_bias), at_most(MAX_BIASES)]
INTEGERS = BeforeValidator(_integers)
StopTokens = Annotated[
    list[int],
    Field(max_length=MAX_STOP_TOKENS, fail_fast=True),
    INTEGERS,
    at_most(MAX_STOP_TOKENS),
]
Objects = Annotated[list[dict[str, object]], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Temperature = Annotated[float, Field(ge=0), AfterValidator(lambda t: min(t, MAX_TEMPERATURE))]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
Stops = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_listed),
    AfterValidator(_short_together),
]


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


def _without_nulls(value: object) -> object:
    """As at the top: `null` is as if the name were left out."""
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if inner is not None}


class StreamOptions(Strict):
    _nulls = model_validator(mode="before")(_without_nulls)

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
    temperature: Temperature | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: CountOrAll | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    stop: Stops = []
    stop_token_ids: StopTokens = []
    include_stop_str_in_output: bool = False
    max_completion_tokens: Count | None = None
    min_tokens: Int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Bias = {}
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

    messages: Annotated[Objects, Field(min_length=1)]
    add_special_tokens: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = {}
    documents: Objects | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class ChatRequest(Conversation, GenerationRequest):
    max_tokens: Annotated[int, Field(ge=1), _Integral] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), _Integral] | None = None
    logprobs: bool = False
    top_logprobs: Int = Field(0, ge=0, le=MAX_LOGPROBS)
    echo: bool = False


def validate(form: type[M], document: dict[str, object]) -> M:
    """Raises ApiError that names the first wrong field, what is allowed and what was given."""
    try:
        return form.model_validate(document)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_context=False)
        error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    field = shortened(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        message = f"unknown field `{field}`{hint(field)}"
        raise ApiError(message, param=field, code="unknown_parameter")
    if error["type"] == "missing":
        raise ApiError(f"`{field}` is required", param=field, code="missing_required_parameter")
    raise ApiError(f"`{field}`: {error['msg']}, got {brief(error['input'])}", param=field)
