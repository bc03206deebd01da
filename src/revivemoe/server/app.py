"""The application: wires the routes to an engine. Read this first."""

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from revivemoe.detokenizer import Tokenizer, Vocabulary
from revivemoe.server.auth import Keys
from revivemoe.server.errors import LastResort, install_error_handlers
from revivemoe.server.fault_tolerance import fault_tolerance_routes
from revivemoe.server.head import HeadAsGet
from revivemoe.server.lifetime import ClientGone, Lifetime, UnderWay
from revivemoe.server.openai_routes import Generation, openai_routes
from revivemoe.server.probes import operations_routes
from revivemoe.server.prompts import PromptEncoder
from revivemoe.server.token_routes import token_routes
from revivemoe.server.unsupported import unsupported_routes
from revivemoe.streams import ServingEngine

CLIENT_CLOSED_REQUEST = 499
ANY_ORIGIN = ("*",)


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    *,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    enable_fault_injection: bool = False,
    chat_template: str | None = None,
    allowed_origins: Sequence[str] = ANY_ORIGIN,
    cut: asyncio.Event | None = None,
) -> FastAPI:
    """The HTTP interface to `engine`.

    `api_key` guards everything under /v1; `admin_api_key` guards `apply` and `inject`, which stay
    shut when only `api_key` is set, and to web pages whose origin is not named. `chat_template`:
    another one than the tokenizer's. `allowed_origins`: whose web pages may ask; `*`: all.
    `cut`: once set, open responses end; `app.state.lifetime` has it for `serve_app`.
    """
    keys = Keys(api_key, admin_api_key, tuple(allowed_origins))
    lifetime = Lifetime(cut)
    encoder = PromptEncoder(tokenizer, engine.model, chat_template)
    generation = Generation(engine, encoder, Vocabulary(tokenizer), lifetime)

    app = FastAPI(title="ReviveMoE", redoc_url=None)
    app.state.lifetime = lifetime
    app.include_router(openai_routes(generation, keys.require_user))
    app.include_router(fault_tolerance_routes(engine, keys, lifetime, enable_fault_injection))
    app.include_router(token_routes(generation, keys.require_user))
    app.include_router(operations_routes(engine, lifetime))
    app.include_router(unsupported_routes())
    app.add_exception_handler(ClientGone, _on_client_gone)
    install_error_handlers(app)
    # From the inside out: a page may read our own bug's 500 as well.
    app.add_middleware(LastResort)
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-revivemoe-quality"],
    )
    app.add_middleware(UnderWay, lifetime=lifetime)
    return app


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
