"""`HEAD` wherever there is `GET`: monitors and load balancers ask so."""

from starlette.types import ASGIApp, Receive, Scope, Send

ENDLESS = ("/fault_tolerance/events",)


class HeadAsGet:
    """Answers as to `GET`; the server leaves the body out. What would not end is not asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        if is_head and not scope["path"].endswith(ENDLESS):
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
