"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
import math
from dataclasses import KW_ONLY, dataclass

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revivemoe.streams import EngineUnavailable, FellBehind

logger = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_S = 5.0

_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "service_unavailable_error",
}


def dumps(document: object) -> str:
    """Compact and ASCII: whatever a string holds can be sent, and U+2028 ends no line of events."""
    return json.dumps(document, separators=(",", ":"))


class Json(Response):
    """A JSON document."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """As `dumps` writes it."""
        return dumps(content).encode()


@dataclass(eq=False)
class ApiError(Exception):
    """Ends a request with `status` and an error object."""

    message: str
    status: int = 400
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    def document(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": _error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Json:
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 408:
            headers["Connection"] = "close"
        if self.status == 503:
            headers["Retry-After"] = retry_after(self.retry_after_s)
        return Json(self.document(), self.status, headers)


def retry_after(seconds: float | None) -> str:
    """Value of the `Retry-After` header: whole seconds, at least one."""
    return str(max(1, math.ceil(DEFAULT_RETRY_AFTER_S if seconds is None else seconds)))


def internal_error() -> ApiError:
    return ApiError("internal error; the server's log has the details", 500)


def shutting_down() -> ApiError:
    return ApiError("the server is shutting down", 503, code="shutting_down")


def of_engine(error: EngineUnavailable | FellBehind) -> ApiError:
    """What the engine cannot do, as a client is told."""
    if isinstance(error, FellBehind):
        return ApiError(f"{error}: ask again for those to come", 503, code="fell_behind")
    return ApiError(str(error), 503, code="engine_unavailable", retry_after_s=error.retry_after_s)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(EngineUnavailable, _on_unavailable)
    app.add_exception_handler(HTTPException, _on_http_exception)


class LastResort:
    """The process boundary: our own bug in a handler becomes a 500 and one line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            logger.error("%s: %s", scope.get("path"), describe(error))
            if started:
                raise
            await internal_error().response()(scope, receive, send)


def describe(error: Exception) -> str:
    """One line: type, message and the place it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = ""
    if trace is not None:
        place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    return f"{type(error).__name__}: {error}{place}".replace("\n", " ")


def _error_type(status: int) -> str:
    if status in _TYPE_OF_STATUS:
        return _TYPE_OF_STATUS[status]
    return "invalid_request_error" if status < 500 else "server_error"


async def _on_api_error(request: Request, error: Exception) -> Json:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_unavailable(request: Request, error: Exception) -> Json:
    assert isinstance(error, EngineUnavailable)
    return of_engine(error).response()


async def _on_http_exception(request: Request, error: Exception) -> Json:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(message, error.status_code).response()
    response.headers.update(error.headers or {})
    return response
