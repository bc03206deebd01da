"""Endpoints of OpenAI and vLLM that this server does not have: said in one line."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from revivemoe.server.errors import ApiError

_INSTEAD = "use /v1/chat/completions or /v1/completions"
_PATHS = (
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/moderations",
    "/v1/batches",
    "/v1/files",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/rerank",
    "/pooling",
    "/classify",
)
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def unsupported_routes() -> APIRouter:
    """Each answers 404 whatever it is asked."""
    router = APIRouter(include_in_schema=False)
    for path in _PATHS:
        router.add_api_route(path, _refuse, methods=_METHODS)
    return router


async def _refuse(request: Request) -> Response:
    message = f"{request.url.path} is not supported by this server: {_INSTEAD}"
    raise ApiError(message, 404, code="unsupported_endpoint")
