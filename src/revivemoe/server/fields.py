"""Request fields this server knows but does not act on: refused, or accepted where harmless."""

from revivemoe.server.errors import ApiError

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Without influence on the answer: accepted with any value."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Features that are not supported, with the values that ask for nothing. `null` always does."""


def acted_upon(document: dict[str, object]) -> dict[str, object]:
    """The fields to act upon. Raises ApiError naming a field that asks for what is not there."""
    kept = {}
    for name, value in document.items():
        if name not in NEUTRAL and name not in HARMLESS:
            if value is not None:
                kept[name] = value
        elif name in NEUTRAL and not _asks_for_nothing(name, value, document):
            raise ApiError(
                f"`{name}` is not supported by this server{_instead(name)}",
                param=name,
                code="unsupported_parameter",
            )
    return kept


def _asks_for_nothing(name: str, value: object, document: dict[str, object]) -> bool:
    if name == "best_of":
        return value is None or value == (document.get("n") or 1)
    return value is None or value in NEUTRAL[name]


def _instead(name: str) -> str:
    values = NEUTRAL[name]
    return f" except as {values[0]!r}: leave it out" if values else ": leave it out"
