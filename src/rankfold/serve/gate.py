"""What every HTTP request has to pass: who may ask, how much may be sent; and what is noted of it."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankfold.serve.errors import ApiError
from rankfold.serve.metrics import Metrics

NOTES = "rankfold.notes"  # where handlers add to what is logged of a request
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}
_PATIENCE = 30.0  # seconds that a body may take
_OPEN = {"/health"}
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Gate:
    """Passes on to `app` the requests that may be asked.

    With a key, all but /health need it. Without, the server is this machine's own, and a request has to name it as
    such: a page in a browser whose own name was made to lead here does not.
    """

    app: ASGIApp
    metrics: Metrics
    api_key: str | None
    max_body: int
    log: Log | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, id_ = time.monotonic(), 500, uuid.uuid4().hex
        scope[NOTES] = notes = {}

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
            except ApiError as error:
                await error.response(scope, receive, noting)
            else:
                await self.app(scope, _replayed(body, receive), noting)
        finally:
            seconds = time.monotonic() - begun
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            if self.log is not None:
                client = (scope.get("client") or ("", 0))[0]
                asked = {"id": id_, "client": client, "method": scope["method"], "path": scope["path"]}
                self.log({**asked, "status": status, "seconds": round(seconds, 4), **notes})

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.api_key is None:
            host = headers.get("host", "")
            if (host if host.endswith("]") else host.rpartition(":")[0] or host) not in _LOCAL:
                raise ApiError(403, "this server answers to localhost only", code="wrong_host")
        elif scope["path"] not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401,
                    "give the server's key as a bearer token: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body, whole. What is too long is read for a while before it is refused: a client that is still sending
        would not see the answer."""
        parts, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(_PATIENCE):
                while more and size <= 16 * self.max_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client left")
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size <= self.max_body:
                        parts.append(message.get("body", b""))
        except TimeoutError:
            message = f"the body took longer than {_PATIENCE:.0f} s"
            raise ApiError(408, message, headers={"Connection": "close"}) from None
        if size > self.max_body:
            message = f"the body is longer than the {self.max_body:,} bytes that this server takes"
            raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
