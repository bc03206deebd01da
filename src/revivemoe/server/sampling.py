"""From a checked request to the engine's `SamplingParams`: limits and defaults."""

import secrets

from revivemoe.sampling_params import SamplingParams
from revivemoe.server.errors import ApiError
from revivemoe.server.prompts import MAX_CHOICES, TokenIds, check_vocabulary
from revivemoe.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from revivemoe.streams import ModelInfo, StopStrings, Submission

DEFAULT_COMPLETION_TOKENS = 16
MAX_BIAS = 100.0
"""Beyond it a bias decides alone anyway (as in OpenAI's API; vLLM cuts there, too)."""


def wanted_tokens(form: CompletionRequest | ChatRequest) -> int | None:
    """How many tokens a request asks for at most: by the newer name, or the older one."""
    newer = form.max_completion_tokens
    return form.max_tokens if newer is None else newer


def completion_submission(
    request_id: str, form: CompletionRequest, prompts: tuple[TokenIds, ...], model: ModelInfo
) -> Submission:
    """Raises ApiError. `echo` with `max_tokens` 0 generates one token, which nobody sees.

    The checkpoint's `max_new_tokens` is for chats: here 16 is OpenAI's default, and vLLM's.
    """
    if wanted_tokens(form) == 0 and not form.echo:
        name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
        raise ApiError(f"`{name}` must be at least 1 without `echo`, got 0", param=name)
    prompt_logprobs = form.logprobs if form.echo else None
    default = DEFAULT_COMPLETION_TOKENS
    params = _params(form, model, prompts, default, form.logprobs, prompt_logprobs)
    return _submission(request_id, form, prompts, params)


def chat_submission(
    request_id: str, form: ChatRequest, prompt: TokenIds, model: ModelInfo
) -> Submission:
    """Raises ApiError."""
    if form.top_logprobs and not form.logprobs:
        raise ApiError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    logprobs = form.top_logprobs if form.logprobs else None
    default = model.defaults.max_tokens or model.max_model_len
    params = _params(form, model, (prompt,), default, logprobs, None)
    return _submission(request_id, form, (prompt,), params)


def _params(
    form: CompletionRequest | ChatRequest,
    model: ModelInfo,
    prompts: tuple[TokenIds, ...],
    default: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """What is asked for is an upper bound: each choice ends where the context does. `default`:
    tokens, where nothing is.
    """
    check_vocabulary(form.stop_token_ids, model.vocab_size, "stop_token_ids")
    check_vocabulary(list(form.logit_bias), model.vocab_size, "logit_bias")
    if not form.spaces_between_special_tokens and not form.skip_special_tokens:
        raise ApiError(
            "`spaces_between_special_tokens` is not supported as false where special tokens are "
            "shown: leave it out",
            param="spaces_between_special_tokens",
            code="unsupported_parameter",
        )
    defaults, wanted = model.defaults, wanted_tokens(form)
    asked = default if wanted is None else max(1, wanted)
    asked = min(asked, defaults.max_tokens_limit or asked)
    if form.min_tokens > asked:
        raise ApiError(
            f"`min_tokens` must be at most the {asked} tokens to generate, got {form.min_tokens}",
            param="min_tokens",
        )
    max_tokens = min(asked, max(1, model.max_model_len - min(map(len, prompts))))
    top_k = defaults.top_k if form.top_k is None else form.top_k
    return SamplingParams(
        seed=_seed(form.seed),
        temperature=_or(form.temperature, defaults.temperature),
        top_p=_or(form.top_p, defaults.top_p),
        top_k=min(max(0, top_k), model.vocab_size),
        min_p=_or(form.min_p, defaults.min_p),
        presence_penalty=form.presence_penalty,
        frequency_penalty=form.frequency_penalty,
        repetition_penalty=_or(form.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_bias(form.logit_bias),
        max_tokens=max_tokens,
        min_tokens=min(form.min_tokens, max_tokens),
        eos_token_ids=() if form.ignore_eos else model.eos_token_ids,
        stop_token_ids=tuple(form.stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(wanted: float | None, default: float) -> float:
    return default if wanted is None else wanted


def _bias(wanted: dict[int, float]) -> tuple[tuple[int, float], ...]:
    cut = ((token, min(MAX_BIAS, max(-MAX_BIAS, bias))) for token, bias in wanted.items())
    return tuple(sorted(cut))


def _seed(wanted: int | None) -> int:
    """63 bits. Without a seed a random one, so that any rank can continue the request."""
    return secrets.randbits(63) if wanted is None else wanted & ((1 << 63) - 1)


def _submission(
    request_id: str, form: GenerationRequest, prompts: tuple[TokenIds, ...], params: SamplingParams
) -> Submission:
    if len(prompts) * form.n > MAX_CHOICES:
        raise ApiError(
            f"`n` {form.n} times {len(prompts)} prompts is more than {MAX_CHOICES} choices",
            param="n",
        )
    stop = StopStrings(tuple(form.stop), form.include_stop_str_in_output)
    return Submission(
        request_id, prompts, form.n, params, stop, form.skip_special_tokens, form.stream
    )
