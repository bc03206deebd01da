"""Who may do what: the model's key for the API, the admin key for `apply` and `inject`."""

import secrets
from dataclasses import dataclass

from fastapi import Request

from revivemoe.server.errors import ApiError


@dataclass(frozen=True)
class Keys:
    """None: no key is needed."""

    api_key: str | None = None
    admin_api_key: str | None = None
    origins: tuple[str, ...] = ()
    """Web pages of these may ask; `*`: all, but not for what an administrator does."""

    async def require_user(self, request: Request) -> None:
        """The model's key, for everything under /v1 that changes nothing."""
        if self.api_key is not None and not _matches(request, self.api_key):
            raise _unauthorized("the API key")

    async def require_reader(self, request: Request) -> None:
        """Either key, for looking at the state of the instance."""
        if self.admin_api_key is None or not _matches(request, self.admin_api_key):
            await self.require_user(request)

    async def require_admin(self, request: Request) -> None:
        """The admin key. Open only where the operator has set no key at all, and not to a web
        page, which any user of a browser may have open, unless its origin is named.
        """
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            raise ApiError(
                "web pages may not use this endpoint unless --allowed-origins names their origin",
                403,
                code="origin_not_allowed",
            )
        if self.admin_api_key is not None:
            if not _matches(request, self.admin_api_key):
                raise _unauthorized("the admin API key")
        elif self.api_key is not None:
            await self.require_user(request)
            raise ApiError(
                "the model's key is not enough for this endpoint: start the server with "
                "--admin-api-key and send that key",
                403,
                code="admin_key_not_set",
            )


def _matches(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = secrets.compare_digest(given.strip().encode(), key.encode())
    return scheme.lower() == "bearer" and right


def _unauthorized(what: str) -> ApiError:
    message = f"{what} is missing or wrong: send it as `Authorization: Bearer KEY`"
    return ApiError(message, 401, code="invalid_api_key")
