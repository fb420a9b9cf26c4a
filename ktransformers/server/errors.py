"""What a client is told when something is wrong: OpenAI's error object, or Anthropic's on the endpoints of that API."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ktransformers.server.encoding import JsonResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> type of error. Any other status is the client's fault: an invalid_request_error."""

MESSAGES = "/v1/messages"
"""Paths that begin so answer in Anthropic's shapes."""

_SHOWN = 4
"""Faults of a body that are told at once."""


class ApiError(HTTPException):
    """A request that ends with an error object. `param`: the field at fault; `code`: what programs compare."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def refused(name: str, why: str) -> ApiError:
    """The error for a field that would change the answer and is not supported."""
    return ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")


def error_object(error: HTTPException, path: str, request_id: str | None = None) -> dict[str, Any]:
    """The JSON for an error on `path`."""
    kind, message = TYPES.get(error.status_code, "invalid_request_error"), str(error.detail)
    if path.startswith(MESSAGES):
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException, path: str, request_id: str | None = None) -> Response:
    """The whole response."""
    return JsonResponse(error_object(error, path, request_id), error.status_code, headers=error.headers)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router, and every ApiError."""
    if not isinstance(error, ApiError):
        words = {404: f"{request.url.path}: there is no such endpoint.",
                 405: f"{request.url.path}: {request.method} is not answered here."}  # fmt: skip
        error = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    return error_response(error, request.url.path, request.scope.get("kt_id"))


async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    """A body that does not fit the schema: 400, as OpenAI has it, not 422."""
    found = error.errors()
    texts = [f"{_place(one['loc'])}: {one['msg']}" for one in found[:_SHOWN]]
    body = any(tuple(one["loc"]) == ("body",) for one in found)
    step = " Send a JSON object, with Content-Type: application/json." if body else ""
    param = None if body else _place(found[0]["loc"])
    return await on_http_error(request, ApiError(400, "; ".join(texts) + step, param=param))


def _place(loc: tuple[Any, ...]) -> str:
    """("body", "messages", 0, "role") as messages.0.role."""
    return ".".join(str(part)[:100] for part in loc[1:]) or "body"
