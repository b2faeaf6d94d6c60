"""Who may come in, what every request is called, and how failures are told: what lies around all routes."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from .connection import ClientLeftError
from .fields import ApiError
from .metrics import Metrics
from .protocol import Limits

PUBLIC = ("/", "/health", "/health/live", "/health/ready")  # without a key
NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
LOG = logging.getLogger("minillm.server")


@dataclass(frozen=True)
class Options:
    """How the server was started.  key: what clients have to send; origins: pages elsewhere that may ask
    ("*": all)."""

    name: str
    limits: Limits
    max_body: int
    seconds: float  # that a request may take, unless it says less
    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names by which it may be called; none: all


class Door:
    """Who may come in, what each request is called, and how failures are told."""

    def __init__(self, inner: Router, metrics: Metrics, options: Options) -> None:
        self._inner, self._metrics, self._options = inner, metrics, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if NAME.fullmatch(given) else "req_" + secrets.token_hex(12)
        scope["state"], scope["app"] = {"request_id": name}, self  # with an app, Starlette raises instead of answering
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {"x-request-id": name, "x-content-type-options": "nosniff"}
                message["headers"] = [
                    *message.get("headers", []),
                    *((k.encode(), v.encode()) for k, v in extra.items()),
                ]
            await send(message)

        try:
            self._admit(scope)
            await self._inner(scope, receive, told)
        except ClientLeftError:
            pass
        except Exception as error:
            refusal = _refusal(error)
            if refusal.status >= 500 and not isinstance(error, ApiError):
                LOG.exception("request %s failed, which is a bug of minillm", name)
            if status:  # it has begun: nothing but cutting it off would be true
                raise
            await JSONResponse(refusal.body(), refusal.status, refusal.headers())(scope, receive, told)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self._metrics.requests.labels(path, str(status or "left")).inc()
        return None

    def _admit(self, scope: Scope) -> None:
        """Raise ApiError for whoever may not come in."""
        headers, options = Headers(scope=scope), self._options
        host, origin = headers.get("host", ""), headers.get("origin")
        if options.hosts and _hostname(host) not in options.hosts:  # a foreign name that leads here: DNS rebinding
            raise ApiError(403, "this server answers to localhost only: use that name", "permission_error")
        own = origin is None or origin.partition("://")[2] == host
        if not (own or origin in options.origins or "*" in options.origins):
            raise ApiError(
                403, f"pages of {origin[:100] if origin else ''} may not ask: see --allow-origin", "permission_error"
            )
        if options.key is None or scope["path"] in PUBLIC:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), options.key.encode()):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "authentication_error", code="invalid_api_key")


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        what = {404: "there is nothing at this address", 405: "this address takes no such method"}
        message = what.get(error.status_code, str(error.detail))
        return ApiError(
            error.status_code, message, "not_found_error" if error.status_code == 404 else "invalid_request_error"
        )
    return ApiError(500, "the server failed, which is a bug of minillm: see its log", "server_error")


def _hostname(host: str) -> str:
    """A Host header without its port: 127.0.0.1:80, localhost, [::1]:80."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
