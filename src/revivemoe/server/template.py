"""The chat template: which one, and what a request may pass to it."""

import inspect
from functools import cached_property

from jinja2 import TemplateError

from revivemoe.detokenizer import Tokenizer
from revivemoe.server.errors import ApiError
from revivemoe.server.messages import Message, plain_messages
from revivemoe.server.schema import Conversation, brief


class ChatTemplate:
    """Renders conversations. `source`: another template than the tokenizer's own."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer, self._source = tokenizer, source

    def render(self, form: Conversation) -> str:
        """The prompt of a conversation. Raises ApiError."""
        source = self._template
        messages = plain_messages(form.messages, "developer" in source)
        begins_turn, goes_on = _turn(form)
        if goes_on and not messages[-1]["content"]:
            raise ApiError("the final message to continue is empty", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=source,
                add_generation_prompt=begins_turn,
                continue_final_message=goes_on,
                **self._variables(form),
            )
        except (TemplateError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise ApiError(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        return str(text)

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


def read_template(given: str) -> str:
    """The template in a file. Raises ValueError, one line, if it cannot be used."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        with open(given, encoding="utf-8") as file:
            source = file.read()
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {brief(given)} cannot be read: {error}") from None
    except TemplateError as error:
        raise ValueError(f"--chat-template {given} is no Jinja template: {error}") from None
    return source
