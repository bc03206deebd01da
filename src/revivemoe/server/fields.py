"""Request fields that are not acted upon: accepted because the answer is the same, or refused.

Together with the fields of `schema` these are all fields of OpenAI's API and of vLLM's;
`docs/api.md` is written from both. Anything else is an unknown field, and refused.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass

from revivemoe.server.brief import brief
from revivemoe.server.errors import ApiError

logger = logging.getLogger(__name__)

Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)


@dataclass(frozen=True)
class Accepted:
    """Has no effect on the answer; `null`, or a value of one of these kinds."""

    kinds: Kinds
    why: str


@dataclass(frozen=True)
class Refused:
    """Asks for what is not there, unless it is `null` or one of these values."""

    nothing: tuple[object, ...]
    what: str


ACCEPTED: dict[str, Accepted] = {
    # OpenAI
    "metadata": Accepted((dict,), "for the caller's own use"),
    "parallel_tool_calls": Accepted((bool,), "there are no tools"),
    "prediction": Accepted((dict,), "speculation changes the speed, not the answer"),
    "prompt_cache_key": Accepted((str,), "the prefix cache needs no hint"),
    "prompt_cache_options": Accepted((dict,), "the prefix cache needs no hint"),
    "prompt_cache_retention": Accepted((str,), "the prefix cache needs no hint"),
    "safety_identifier": Accepted((str,), "for the caller's own use"),
    "service_tier": Accepted((str,), "there is one tier"),
    "store": Accepted((bool,), "nothing is stored"),
    "user": Accepted((str,), "for the caller's own use"),
    # vLLM
    "cache_salt": Accepted((str,), "the prefix cache is shared; times may tell, answers do not"),
    "length_penalty": Accepted(NUMBER, "there is no beam search"),
    "media_io_kwargs": Accepted((dict,), "there are no media"),
    "mm_processor_kwargs": Accepted((dict,), "there are no media"),
    "priority": Accepted((int,), "requests are served in their order"),
    "return_mm_kwargs": Accepted((bool,), "there are no media"),
    "return_token_offsets": Accepted((bool,), "as in vLLM: for rendering alone"),
    "session_id": Accepted((str,), "for the caller's own use"),
    "stream_interval": Accepted((int,), "chunks are cut as tokens come"),
}

REFUSED: dict[str, Refused] = {
    # OpenAI
    "audio": Refused((), "audio output"),
    "best_of": Refused((), "ranking of choices"),
    "function_call": Refused(("none", "auto"), "function calling"),
    "functions": Refused(([],), "function calling"),
    "modalities": Refused((["text"],), "output that is not text"),
    "moderation": Refused((), "moderation"),
    "response_format": Refused(({"type": "text"},), "structured output"),
    "suffix": Refused(("",), "insertion of text"),
    "tool_choice": Refused(("none", "auto"), "tool calling"),
    "tools": Refused(([],), "tool calling"),
    "verbosity": Refused(("medium",), "verbosity"),
    "web_search_options": Refused((), "web search"),
    # vLLM
    "allowed_token_ids": Refused((), "an allow-list of tokens"),
    "bad_words": Refused(([],), "forbidden words"),
    "chat_template": Refused(("",), "a template in the request (the server has --chat-template)"),
    "ec_transfer_params": Refused(({},), "transfer of encoder caches"),
    "guided_choice": Refused((), "structured output"),
    "guided_decoding_backend": Refused((), "structured output"),
    "guided_grammar": Refused((), "structured output"),
    "guided_json": Refused((), "structured output"),
    "guided_regex": Refused((), "structured output"),
    "guided_whitespace_pattern": Refused((), "structured output"),
    "include_reasoning": Refused((True,), "splitting off of the reasoning"),
    "kv_transfer_params": Refused(({},), "transfer of KV caches"),
    "logprob_token_ids": Refused((), "log-probabilities of chosen tokens"),
    "prompt_embeds": Refused((), "prompts as embeddings"),
    "prompt_logprobs": Refused((), "prompt log-probabilities (except by echo with logprobs)"),
    "repetition_detection": Refused((), "detection of repetitions"),
    "return_prompt_text": Refused((False,), "the rendered prompt"),
    "routed_experts_prompt_start": Refused((0,), "the routing of tokens in the answer"),
    "structured_outputs": Refused(({},), "structured output"),
    "thinking_token_budget": Refused((-1,), "a budget for thinking"),
    "use_beam_search": Refused((False,), "beam search"),
    "vllm_xargs": Refused(({},), "arguments of extensions"),
    "watermarking": Refused((False,), "watermarks"),
}

_HINTS = {
    "enable_thinking": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}
"""Names of other servers for what is there under another one."""

_told: set[str] = set()


def acted_upon(document: dict[str, object], known: Collection[str]) -> dict[str, object]:
    """The fields to act upon, of a document without nulls, up to the first that is not `known`:
    there may be millions. Raises ApiError naming a field that asks for what is not there.
    """
    kept = {}
    for name, value in document.items():
        if name in ACCEPTED:
            _accept(name, value, ACCEPTED[name])
        elif name in REFUSED:
            _check_neutral(name, value, document)
        else:
            kept[name] = value
            if name not in known:
                break
    return kept


def hint(name: str) -> str:
    """What an unknown field may have meant."""
    return f": did you mean `{_HINTS[name]}`?" if name in _HINTS else ""


def integral(value: object) -> object:
    """2.0 is an integer: some clients know but one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _accept(name: str, value: object, rule: Accepted) -> None:
    value = integral(value)
    right = isinstance(value, rule.kinds) and (bool in rule.kinds or not isinstance(value, bool))
    if not right:
        kinds = " or ".join(_an(JSON_TYPES[kind]) for kind in rule.kinds)
        raise ApiError(f"`{name}` must be {kinds}", param=name)
    if name not in _told:
        _told.add(name)
        logger.debug("`%s` is accepted and has no effect: %s", name, rule.why)


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    str: "string",
}


def _check_neutral(name: str, value: object, document: dict[str, object]) -> None:
    rule, value = REFUSED[name], integral(value)
    nothing = (integral(document.get("n", 1)),) if name == "best_of" else rule.nothing
    if any(type(value) is type(one) and value == one for one in nothing):
        return
    instead = f" except as {brief(nothing[0])}" if nothing else ""
    raise ApiError(
        f"`{name}` is not supported by this server ({rule.what}){instead}: leave it out",
        param=name,
        code="unsupported_parameter",
    )
