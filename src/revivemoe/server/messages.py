"""Chat messages: what a template is given of them."""

from revivemoe.server.brief import brief
from revivemoe.server.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant")
_KEPT = ("name", "reasoning_content", "reasoning")
"""Beside role and content: templates may use them. Anything else on a message has no effect."""
_TOOLS = ("tool_calls", "function_call", "tool_call_id")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

Message = dict[str, object]


def plain_messages(messages: list[Message], knows_developer: bool) -> list[Message]:
    """Each with its content as one string. Raises ApiError naming what is not supported.

    `knows_developer`: the template does something of its own with that role; else it is `system`.
    """
    plain = [_plain(k, message) for k, message in enumerate(messages)]
    for message in plain:
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
    return plain


def _plain(position: int, message: Message) -> Message:
    where = f"messages.{position}"
    role = message.get("role")
    if role in ("tool", "function"):
        raise _unsupported(f"{where}.role", f"messages of a {role}")
    if role not in _ROLES:
        raise ApiError(
            f"`{where}.role` must be one of {', '.join(_ROLES)}, got {brief(role)}",
            param=f"{where}.role",
        )
    for name in (*_TOOLS, "audio"):
        if message.get(name) not in (None, [], {}):
            raise _unsupported(f"{where}.{name}", "tool calling" if name in _TOOLS else name)
    if "content" not in message and role != "assistant":
        raise ApiError(f"`{where}.content` is required", param=f"{where}.content")
    kept = {name: _string(f"{where}.{name}", message.get(name)) for name in _KEPT}
    given = {name: value for name, value in kept.items() if value is not None}
    return {"role": role, "content": _text(f"{where}.content", message.get("content")), **given}


def _unsupported(where: str, what: str) -> ApiError:
    message = f"`{where}`: {what} is not supported by this server"
    return ApiError(message, param=where, code="unsupported_parameter")


def _string(where: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ApiError(f"`{where}` must be a string", param=where)


def _text(where: str, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"`{where}` must be a string or a list of text parts", param=where)
    return "\n".join(_part(f"{where}.{k}", part) for k, part in enumerate(content))


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict) and isinstance(kind, str) and kind in _TEXT_PARTS:
        text = part.get(_TEXT_PARTS[kind])
        if isinstance(text, str):
            return text
        raise ApiError(f"`{where}.{_TEXT_PARTS[kind]}` must be a string", param=where)
    raise ApiError(f"`{where}`: only text parts are supported, got {str(kind)[:40]!r}", param=where)
