"""The HTTP server: OpenAI's API, the fault-tolerance API, health and metrics."""

from revivemoe.server.app import create_app
from revivemoe.server.run import serve_app

__all__ = ["create_app", "serve_app"]
