"""The application: wires the routes to an engine. Read this first."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from revivemoe.detokenizer import Tokenizer, Vocabulary
from revivemoe.server.auth import Keys
from revivemoe.server.errors import install_error_handlers
from revivemoe.server.fault_tolerance import fault_tolerance_routes
from revivemoe.server.lifetime import ClientGone, Lifetime
from revivemoe.server.openai_routes import Generation, openai_routes
from revivemoe.server.probes import operations_routes
from revivemoe.server.prompts import PromptEncoder
from revivemoe.streams import ServingEngine

CLIENT_CLOSED_REQUEST = 499


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    *,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    enable_fault_injection: bool = False,
) -> FastAPI:
    """The HTTP interface to `engine`.

    `api_key` guards everything under /v1; `admin_api_key` guards `apply` and `inject`, which stay
    shut when only `api_key` is set. `app.state.lifetime` is how `serve_app` ends open streams.
    """
    keys = Keys(api_key, admin_api_key)
    lifetime = Lifetime()
    encoder = PromptEncoder(tokenizer, engine.model)
    generation = Generation(engine, encoder, Vocabulary(tokenizer), lifetime)

    app = FastAPI(title="ReviveMoE", redoc_url=None)
    app.state.lifetime = lifetime
    app.include_router(openai_routes(generation, keys.require_user))
    app.include_router(fault_tolerance_routes(engine, keys, lifetime, enable_fault_injection))
    app.include_router(operations_routes(engine))
    app.add_exception_handler(ClientGone, _on_client_gone)
    install_error_handlers(app)
    return app


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
