"""What every request passes: an id, a line in the log, its key, the limits of its body. Plain ASGI, outermost first."""

import asyncio
import logging
import secrets
import time
import traceback
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktransformers.server.errors import MESSAGES, ApiError, error_response
from ktransformers.server.service import Service, is_request_id

log = logging.getLogger("ktransformers.server")

OPEN = {"/health"}
"""Paths without a key, beside those of the page."""


_ASKED_OFTEN = {"/health", "/metrics", "/kt/machine"}
"""By programs, all the time: no lines of the log."""


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


class Outermost:
    """Gives each request an id, counts and logs it, and turns what nobody expected into an error object.

    Of an exception the log has its kind and place; its text may hold a prompt.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = _headers(scope).get(b"x-request-id", b"").decode("latin-1")
        scope["kt_id"] = given if is_request_id(given) else "req_" + secrets.token_hex(12)
        scope["kt_log"] = {}
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                number = scope["kt_id"].encode()
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number)]
                if scope["path"].startswith(MESSAGES):
                    message["headers"].append((b"request-id", number))
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: %s in\n%s", scope["kt_id"], type(error).__name__, where)
            if not status:
                text = "Something failed in the server; its log says where."
                await error_response(ApiError(500, text), scope["path"], scope["kt_id"])(scope, receive, answer)
        finally:
            self._record(scope, status, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(endpoint, str(status or "gone")).inc()
        self._service.metrics.seconds.labels(endpoint).observe(seconds)
        details = "".join(f" {name}={value}" for name, value in scope["kt_log"].items())
        path = quote(scope["path"][:200])
        level = logging.DEBUG if scope["path"] in _ASKED_OFTEN else logging.INFO
        said = "%s %s %s %.3f s%s id=%s"
        log.log(level, said, scope["method"], path, status or "gone", seconds, details, scope["kt_id"])


class Door:
    """Lets in who shows a key, where keys are needed. `open_paths` are for all: a page loads before it can ask."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str] = frozenset()) -> None:
        self._app, self._service, self._open = app, service, open_paths | OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allowed(scope):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        error = ApiError(
            401, "No such API key. Send one as Authorization: Bearer KEY, or as x-api-key.", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )  # fmt: skip
        await error_response(error, scope["path"], scope.get("kt_id"))(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        keys = self._service.keys
        if not keys.needed or scope["type"] == "http" and scope["path"] in self._open:
            return True
        return keys.allow(_headers(scope))


class Bodies:
    """Bounds the bytes of a body, those of all bodies together, and the time that a body may take to arrive."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._limits, self._held = app, service.settings.limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = _headers(scope).get(b"content-length", b"0")
        if int(said) > self._limits.body_bytes if said.isdigit() else True:
            return await error_response(self._too_large(), scope["path"], scope.get("kt_id"))(scope, receive, send)
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.size

    def hold(self, count: int, size: int) -> None:
        """Count bytes of a body, that has `size` now. Raises ApiError where that is too much."""
        self._held += count
        if size > self._limits.body_bytes:
            raise self._too_large()
        if self._held > self._limits.all_bodies_bytes:
            raise ApiError(503, "Too much is being sent at once. Ask again later.", headers={"Retry-After": "1"})

    def _too_large(self) -> ApiError:
        text = f"The body has more than {self._limits.body_bytes} bytes."
        return ApiError(413, text, headers={"Connection": "close"})

    @property
    def seconds(self) -> float:
        return self._limits.body_seconds


class _Body:
    """Receives one body."""

    def __init__(self, bodies: Bodies, receive: Receive) -> None:
        self._bodies, self._receive, self.size = bodies, receive, 0
        self._deadline: float | None = None
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to go
        now = time.monotonic()
        self._deadline = self._deadline or now + self._bodies.seconds
        try:
            message: dict[str, Any] = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - now))
        except asyncio.TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.", headers={"Connection": "close"}) from error
        count = len(message.get("body", b""))
        self.size += count
        self._complete = not message.get("more_body", False)
        self._bodies.hold(count, self.size)
        return message
