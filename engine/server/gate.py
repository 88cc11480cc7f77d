"""Who may ask: the API key, or that the request is for this machine. Counts what is answered."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.metrics import Metrics
from engine.server.schema import RequestError

_OPEN = ("/", "/health")  # without a key


class Gate:
    """ASGI middleware. Without a key, the server is for programs on its own machine."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, metrics: Metrics, paths: Collection[str]
    ) -> None:
        """`paths`: those that the metrics name; the others are counted as one."""
        self._app, self._api_key, self._metrics, self._paths = app, api_key, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        refusal = self._refusal(path, Headers(scope=scope))
        await (self._app if refusal is None else reply(refusal))(scope, receive, counted)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        if self._api_key is None:
            # A site can give its own name the address of this machine, and its pages would then be
            # let through by the browser (DNS rebinding).
            if not is_loopback(_host(headers.get("host", ""))):
                return RequestError(403, "without an API key only names of this machine are served")
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if path in _OPEN or hmac.compare_digest(given.encode(), self._api_key.encode()):
            return None
        return RequestError(
            401,
            "this server wants an API key: Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be that of this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """Of the header `Host`, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def reply(error: RequestError) -> Response:
    retry = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body, error.status, headers=retry)
