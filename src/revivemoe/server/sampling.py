"""From a checked request to the engine's `SamplingParams`: limits and defaults."""

import secrets

from revivemoe.sampling_params import SamplingParams
from revivemoe.server.errors import ApiError
from revivemoe.server.prompts import MAX_CHOICES, TokenIds, check_vocabulary
from revivemoe.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from revivemoe.streams import ModelInfo, StopStrings, Submission

DEFAULT_COMPLETION_TOKENS = 16


def completion_submission(
    request_id: str, form: CompletionRequest, prompts: tuple[TokenIds, ...], model: ModelInfo
) -> Submission:
    """Raises ApiError. `echo` with `max_tokens` 0 generates one token, which nobody sees."""
    if form.max_tokens == 0 and not form.echo:
        raise ApiError("`max_tokens` must be at least 1 without `echo`, got 0", param="max_tokens")
    wanted = None if form.max_tokens is None else max(1, form.max_tokens)
    max_tokens = _max_tokens("max_tokens", wanted, DEFAULT_COMPLETION_TOKENS, prompts, model)
    prompt_logprobs = form.logprobs if form.echo else None
    params = _params(form, model, max_tokens, form.logprobs, prompt_logprobs)
    return _submission(request_id, form, prompts, params)


def chat_submission(
    request_id: str, form: ChatRequest, prompt: TokenIds, model: ModelInfo
) -> Submission:
    """Raises ApiError."""
    if form.top_logprobs and not form.logprobs:
        raise ApiError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    field, wanted = "max_completion_tokens", form.max_completion_tokens
    if wanted is None:
        field, wanted = "max_tokens", form.max_tokens
    max_tokens = _max_tokens(field, wanted, model.max_model_len, (prompt,), model)
    logprobs = form.top_logprobs if form.logprobs else None
    return _submission(
        request_id, form, (prompt,), _params(form, model, max_tokens, logprobs, None)
    )


def _max_tokens(
    field: str, wanted: int | None, default: int, prompts: tuple[TokenIds, ...], model: ModelInfo
) -> int:
    longest = max(len(prompt) for prompt in prompts)
    left = model.max_model_len - longest
    if wanted is None:
        return min(default, left)
    if wanted > left:
        raise ApiError(
            f"`{field}` {wanted} is more than the {left} tokens left: the prompt has {longest} "
            f"tokens and this model's context is {model.max_model_len}",
            param=field,
            code="context_length_exceeded",
        )
    return wanted


def _params(
    form: GenerationRequest,
    model: ModelInfo,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    check_vocabulary(form.stop_token_ids, model.vocab_size, "stop_token_ids")
    if form.min_tokens > max_tokens:
        raise ApiError(
            f"`min_tokens` must be at most the {max_tokens} tokens to generate, "
            f"got {form.min_tokens}",
            param="min_tokens",
        )
    return SamplingParams(
        seed=_seed(form.seed),
        temperature=form.temperature,
        top_p=form.top_p,
        top_k=max(0, form.top_k),
        min_p=form.min_p,
        presence_penalty=form.presence_penalty,
        frequency_penalty=form.frequency_penalty,
        repetition_penalty=form.repetition_penalty,
        max_tokens=max_tokens,
        min_tokens=form.min_tokens,
        eos_token_ids=() if form.ignore_eos else model.eos_token_ids,
        stop_token_ids=tuple(form.stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


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
    return Submission(request_id, prompts, form.n, params, stop)
