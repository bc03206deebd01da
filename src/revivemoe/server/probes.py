"""Health, readiness and metrics: open to everybody, for orchestrators."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from revivemoe import __version__
from revivemoe.server.errors import Json, retry_after
from revivemoe.server.lifetime import Lifetime
from revivemoe.streams import ServingEngine


def operations_routes(engine: ServingEngine, lifetime: Lifetime) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """200 while the engine has not failed; 503 asks an orchestrator to restart it."""
        return _answer(engine.state_name, engine.alive)

    @router.get("/ready")
    async def ready() -> Response:
        """200 while serving; 503 from the moment the server is asked to stop."""
        if lifetime.draining.is_set():
            return _answer("stopping", False)
        return _answer(engine.state_name, engine.ready)

    @router.get("/version")
    async def version() -> Response:
        return Json({"version": __version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(engine.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def _answer(state: str, good: bool) -> Response:
    if good:
        return Json({"status": state})
    return Json({"status": state}, 503, {"Retry-After": retry_after(None)})
