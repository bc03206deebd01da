"""Health, readiness and metrics: open to everybody, for orchestrators."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from revivemoe.server.errors import retry_after
from revivemoe.streams import ServingEngine


def operations_routes(engine: ServingEngine) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine has not failed; 503 asks an orchestrator to restart it."""
        return _state(engine, engine.alive)

    @router.get("/ready")
    async def ready() -> Response:
        """200 while serving."""
        return _state(engine, engine.ready)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def _state(engine: ServingEngine, good: bool) -> Response:
    document = {"status": engine.state_name}
    if good:
        return JSONResponse(document)
    return JSONResponse(document, 503, {"Retry-After": retry_after(None)})
