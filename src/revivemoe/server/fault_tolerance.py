"""The fault-tolerance API: look at recoveries, ask for them, cause faults to test them."""

import asyncio
import uuid
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from revivemoe.server.auth import Keys
from revivemoe.server.bodies import read_json, whole_or_float
from revivemoe.server.described import body, errors
from revivemoe.server.errors import ApiError, Json, of_engine
from revivemoe.server.lifetime import Lifetime, cancel_all
from revivemoe.server.schema import Int, Strict, validate
from revivemoe.server.sse import KEEP_ALIVE, EventStream, event
from revivemoe.streams import FellBehind, ServingEngine


class ApplyRequest(Strict):
    instruction: str = Field(min_length=1, max_length=64)
    params: dict[str, object] = Field({})
    request_id: str | None = Field(None, min_length=1, max_length=256)


class InjectRequest(Strict):
    """What a fault is, whoever brings it about checks further."""

    id: Int
    kind: str = Field(max_length=64)
    at: dict[str, object] | None = None
    params: dict[str, object] | None = None


def fault_tolerance_routes(
    engine: ServingEngine, keys: Keys, lifetime: Lifetime, enable_fault_injection: bool
) -> APIRouter:
    router = APIRouter(tags=["fault tolerance"], responses=errors())
    reader = [Depends(keys.require_reader)]
    admin = [Depends(keys.require_admin)]

    @router.get("/v1/fault_tolerance/status", dependencies=reader)
    @router.get("/fault_tolerance/status", dependencies=reader)
    async def status() -> Response:
        return Json(engine.status())

    async def events() -> Response:
        return EventStream(_events(engine, lifetime), lifetime, last="")

    for path in ("/v1/fault_tolerance/events", "/fault_tolerance/events"):
        router.get(path, dependencies=reader, status_code=200, response_class=EventStream)(events)

    form = body(ApplyRequest)

    @router.post("/v1/fault_tolerance/apply", dependencies=admin, openapi_extra=form)
    @router.post("/fault_tolerance/apply", dependencies=admin, openapi_extra=form)
    async def apply(request: Request) -> Response:
        document = await read_json(request, whole_or_float)
        return await _apply(engine, validate(ApplyRequest, _renamed(document)))

    fault = body(InjectRequest)

    @router.post("/v1/fault_tolerance/inject", dependencies=admin, openapi_extra=fault)
    async def inject(request: Request) -> Response:
        if not enable_fault_injection:
            raise _no_injection("start the server with --enable-fault-injection to inject faults")
        form = validate(InjectRequest, await read_json(request, whole_or_float))
        return await _inject(engine, form.model_dump(exclude_none=True))

    return router


def _renamed(document: dict[str, object]) -> dict[str, object]:
    """An earlier vLLM's names for the same."""
    renamed = {name.removeprefix("fault_tolerance_"): v for name, v in document.items()}
    timeout, params = renamed.pop("timeout", None), renamed.get("params", {})
    if timeout is not None and isinstance(params, dict):
        renamed["params"] = {**params, "timeout": timeout}
    return renamed


async def _apply(engine: ServingEngine, form: ApplyRequest) -> Response:
    request_id = form.request_id or f"ft-{uuid.uuid4().hex}"
    try:
        document = await engine.apply(form.instruction, form.params, request_id)
    except ValueError as error:
        raise ApiError(str(error)) from error
    if document is not None:
        return Json(document)
    return Json({"request_id": request_id}, 202)


async def _inject(engine: ServingEngine, fault: dict[str, object]) -> Response:
    try:
        injection_id = await engine.inject(fault)
    except ValueError as error:
        raise ApiError(str(error)) from error
    except PermissionError as error:
        raise _no_injection(str(error)) from error
    return Json({"injection_id": injection_id}, 202)


def _no_injection(message: str) -> ApiError:
    return ApiError(message, 403, code="fault_injection_disabled")


async def _events(engine: ServingEngine, lifetime: Lifetime) -> AsyncGenerator[str, None]:
    """What the engine tells, until the server stops."""
    yield KEEP_ALIVE
    draining = asyncio.ensure_future(lifetime.draining.wait())
    source = engine.events()
    following = asyncio.ensure_future(anext(source))
    try:
        while not draining.done():
            await asyncio.wait({following, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            try:
                document = following.result()
            except StopAsyncIteration:
                return
            except FellBehind as error:
                raise of_engine(error) from error
            yield event(document)
            following = asyncio.ensure_future(anext(source))
    finally:
        await cancel_all(following, draining)
        if isinstance(source, AsyncGenerator):
            await source.aclose()
