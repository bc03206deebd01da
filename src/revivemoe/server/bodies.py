"""The body of a request: read within bounds, one JSON object."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from revivemoe.server.aside import aside
from revivemoe.server.brief import brief
from revivemoe.server.errors import ApiError
from revivemoe.server.fields import acted_upon, integral
from revivemoe.server.lifetime import ClientGone
from revivemoe.server.schema import validate

MAX_BODY_BYTES = 32 << 20
READ_WITHIN_S = 60.0
_INLINE_BYTES = 1 << 18
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

M = TypeVar("M", bound=BaseModel)


async def read_generation(request: Request, form: type[M]) -> M:
    """A form beside which there may be any field of OpenAI's API and vLLM's. Raises ApiError."""
    return validate(form, acted_upon(await read_json(request), form.model_fields))


async def read_json(
    request: Request, parse_float: Callable[[str], object] = float
) -> dict[str, object]:
    """The body as a JSON object, without the names whose value is null: that is as if they were
    left out. Raises ApiError, and ClientGone when the client goes away before the end.
    """
    _check_type(request)
    body = await request.app.state.lifetime.before_the_cut(_read(request))
    try:
        parsed = partial(_parsed, body, parse_float)
        document = await aside(parsed, len(body), _INLINE_BYTES)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: {error.reason}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return {name: value for name, value in document.items() if value is not None}


def whole_or_float(digits: str) -> object:
    """For `read_json`, where 2.0 is an integer at any depth."""
    return integral(float(digits))


def _check_type(request: Request) -> None:
    """A web page may send any other type, or none, without asking its browser for leave first.

    Programs that name no type are taken at their word; a page cannot leave out its origin.
    """
    given = request.headers.get("content-type")
    if given is None and "origin" not in request.headers:
        return
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            f"the content type is {brief(given or 'missing')}, but only JSON is read: send it with "
            "-H 'Content-Type: application/json'",
            415,
            code="unsupported_media_type",
        )


async def _read(request: Request) -> bytearray:
    body = bytearray()
    try:
        async with asyncio.timeout(READ_WITHIN_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(f"the body is longer than {MAX_BODY_BYTES} bytes", 413)
    except TimeoutError:
        raise ApiError(f"the body did not come within {READ_WITHIN_S:g} s", 408) from None
    except ClientDisconnect:
        raise ClientGone from None
    return body


def _parsed(body: bytearray, parse_float: Callable[[str], object]) -> object:
    """Raises ValueError and RecursionError."""
    text = body.decode()
    document = json.loads(text, object_pairs_hook=_no_duplicates, parse_float=parse_float)
    if _ESCAPED_SURROGATE.search(text):
        _check_unicode(document)
    return document


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {brief(twice)} occurs twice in one object")
    return found


def _check_unicode(document: object) -> None:
    """Raises ValueError for half of a surrogate pair, anywhere. Nothing here goes through a
    document name by name: it may have millions, and most hold whole pairs.
    """
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds a lone surrogate, which is not Unicode") from None
