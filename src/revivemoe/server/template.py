"""The chat template: which one, and what a request may pass to it."""

import inspect
from functools import cached_property

from jinja2 import TemplateSyntaxError

from revivemoe.detokenizer import Tokenizer
from revivemoe.server.errors import ApiError
from revivemoe.server.messages import Message, plain_messages
from revivemoe.server.schema import Conversation, brief

_MARK = "brevity is wanted"
_NOBODY = "bystander"
"""A role that no template knows."""
_LONGEST_REASON = 300


class ChatTemplate:
    """Renders conversations. `source`: another template than the tokenizer's own."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._knows_developer: dict[str, bool] = {}

    def render(self, form: Conversation) -> str:
        """The prompt of a conversation. Raises ApiError."""
        source = self._template
        messages = plain_messages(form.messages, self._is_developer_known(source))
        begins_turn, goes_on = _turn(form)
        if goes_on and not messages[-1]["content"]:
            raise ApiError("the final message to continue is empty", param="messages")
        variables = self._variables(form)
        turn = {"add_generation_prompt": begins_turn, "continue_final_message": goes_on}
        try:
            return self._text(source, messages, **turn, **variables)
        except Exception as error:  # whatever a program of somebody else's may raise
            raise ApiError(
                f"the chat template refused the messages: {_reason(error)}", param="messages"
            ) from error

    def _text(self, source: str, messages: list[Message], **options: object) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=source, **options
            )
        )

    def _is_developer_known(self, source: str) -> bool:
        """Whether the template shows a developer's message, and not just as that of any role: a
        model whose template only copies the role's name has not learned that one.
        """
        if source not in self._knows_developer:
            shown, control = self._probe(source, "developer"), self._probe(source, _NOBODY)
            self._knows_developer[source] = _MARK in shown and shown != control
        return self._knows_developer[source]

    def _probe(self, source: str, role: str) -> str:
        """What becomes of a message of this role, whatever its name: nothing if it is refused."""
        messages: list[Message] = [
            {"role": role, "content": _MARK},
            {"role": "user", "content": "x"},
        ]
        try:
            text = self._text(source, messages)
        except Exception:  # as above
            return ""
        return text.casefold().replace("developer", _NOBODY)

    @property
    def _template(self) -> str:
        if self._source is not None:
            return self._source
        try:
            return self._tokenizer.get_chat_template()
        except ValueError:
            raise ApiError(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                code="no_chat_template",
            ) from None

    def _variables(self, form: Conversation) -> Message:
        """What the template may look at beside the messages."""
        given = form.chat_template_kwargs
        if taken := sorted(given.keys() & self._reserved):
            where = f"chat_template_kwargs.{taken[0]}"
            raise ApiError(f"`{where}` cannot be set by a request", param=where)
        found: Message = {}
        if form.reasoning_effort is not None:
            thinks = form.reasoning_effort != "none"
            found = {"reasoning_effort": form.reasoning_effort, "enable_thinking": thinks}
        if form.documents is not None:
            found["documents"] = form.documents
        return found | given

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """What the rendering itself is told."""
        known = inspect.signature(self._tokenizer.apply_chat_template).parameters
        return frozenset(known) - {"documents"} | {"messages"}


def _turn(form: Conversation) -> tuple[bool, bool]:
    """Whether the assistant's turn begins, and the last message goes on. Raises ApiError."""
    begins, goes_on = form.add_generation_prompt, form.continue_final_message
    if begins and goes_on:
        raise ApiError(
            "`continue_final_message` and `add_generation_prompt` cannot both be true",
            param="continue_final_message",
        )
    return (not goes_on if begins is None else begins), goes_on


def _reason(error: Exception) -> str:
    """One line; an error of a template may hold the whole conversation."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def weight(form: Conversation, most: int) -> float:
    """How long the rendering may take, in characters; counted up to `most`. A number counts as much
    as it says: it may be a width or a number of turns.
    """
    weighed = 0.0
    rest: list[object] = [form.messages, form.documents, form.chat_template_kwargs]
    while rest and weighed <= most:
        weighed += 1
        match rest.pop():
            case str(text):
                weighed += len(text)
            case int() | float() as number:
                weighed += abs(number) if abs(number) <= most else most
            case dict() as fields:
                rest += [*fields, *fields.values()]
            case list() as items:
                rest += items
    return weighed


def read_template(given: str) -> str:
    """The template in a file, or the template itself, as vLLM takes it: what holds `{`, `}` or a
    line break and is no file. Raises ValueError, one line, if it cannot be used.
    """
    try:
        with open(given, encoding="utf-8") as file:
            source = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {brief(given)} cannot be read: {error}") from None
    except OSError as error:
        if not set(given) & set("{}\n"):
            why = error.strerror or error
            raise ValueError(f"--chat-template {brief(given)} cannot be read: {why}") from None
        source = given
    _check_syntax(source, brief(given))
    return source


def _check_syntax(source: str, name: str) -> None:
    """By the environment that is to render it, which knows more than plain Jinja. What a template
    says of one conversation is not held against it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=source)
    except TemplateSyntaxError as error:
        raise ValueError(f"--chat-template {name} is no Jinja template: {_reason(error)}") from None
    except Exception:
        return
