"""The application: which endpoint is where, and what every request passes on its way there."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from ktransformers import __version__
from ktransformers.server import chat, completions, machine, messages, responses, tokens
from ktransformers.server.encoding import JsonResponse, loads
from ktransformers.server.errors import ApiError, on_http_error, on_invalid_body
from ktransformers.server.messages_input import CountRequest, MessagesRequest
from ktransformers.server.middleware import Bodies, Door, Outermost
from ktransformers.server.page_files import Page
from ktransformers.server.responses_input import ResponsesRequest
from ktransformers.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from ktransformers.server.service import Service


class _StrictRequest(Request):
    """A request whose JSON is checked as encoding.loads does."""

    async def json(self) -> Any:
        try:
            return loads(await self.body())
        except ValueError as error:
            text = str(error)
            raise ApiError(400, text[:1].upper() + text[1:], code="invalid_json") from error


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


_ERROR = {"description": "An error object", "content": {"application/json": {"schema": {"type": "object"}}}}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "An answer; a stream where that was asked for", "content": {"text/event-stream": {}}}
}

router = APIRouter(route_class=_Route, responses={"4XX": _ERROR, "5XX": _ERROR})


def _service(request: Request) -> Service:
    return request.app.state.service


# ---- answers -----------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", responses=_ANSWER)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await chat.answer(_service(request), body, request)


@router.post("/v1/completions", responses=_ANSWER)
async def text_completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with texts or token ids."""
    return await completions.answer(_service(request), body, request)


@router.post("/v1/responses", responses=_ANSWER)
async def responses_(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, in the shapes of OpenAI's later API."""
    return await responses.answer(_service(request), body, request)


@router.post("/v1/messages", responses=_ANSWER)
async def messages_(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, in Anthropic's shapes."""
    return await messages.answer(_service(request), body, request)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """How many tokens a conversation has."""
    return await messages.count(_service(request), body)


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    """Left out."""
    raise ApiError(404, "/v1/embeddings: this server answers with text; it computes no embeddings.", code="unsupported")


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text or a conversation."""
    return await tokens.tokenize(_service(request), body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    return await tokens.detokenize(_service(request), body)


# ---- the server itself -------------------------------------------------------------------------------------


def _model(service: Service, name: str) -> dict[str, Any]:
    context = service.served.engine.context if service.served else None
    base, adapters = service.settings.names[0], service.settings.adapters
    return {"id": name, "object": "model", "created": 0, "owned_by": "ktransformers", "max_model_len": context,
            "root": adapters.get(name, base), "parent": base if name in adapters else None}  # fmt: skip


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The names of the model, and of its adapters."""
    service = _service(request)
    return JsonResponse({"object": "list", "data": [_model(service, name) for name in service.names()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """One of them."""
    service = _service(request)
    if name not in service.names():
        text = f"model {name[:200]!r} is not served here, expected one of: {', '.join(service.names())}."
        raise ApiError(404, text, param="model", code="model_not_found")
    return JsonResponse(_model(service, name))


@router.get("/health")
async def health(request: Request) -> Response:
    """503 while the model is being loaded, then 200."""
    _service(request).ready()
    return JsonResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/props")
async def props(request: Request) -> Response:
    """What is served, by which rules, on which machine."""
    service = _service(request)
    served = service.ready()
    has_template = bool(getattr(served.tokenizer, "chat_template", None))
    own = {"version": __version__, "names": service.names(), "context": served.engine.context,
           "vocab_size": served.vocab_size, "chat_template": has_template}  # fmt: skip
    return JsonResponse(own | dict(served.facts))


@router.get("/kt/machine")
async def machine_(request: Request) -> Response:
    """Which module runs where by which rule, memory by device, load, use of experts."""
    served = _service(request).ready()
    return JsonResponse(await asyncio.to_thread(machine.report, served.machine, served.engine.load()))


def create_app(service: Service, page: Page | None = None) -> FastAPI:
    """The application of `service`. `page`: the files at `/`; the package's own without one."""
    page = page or Page()
    app = FastAPI(
        title="KTransformers", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers={HTTPException: on_http_error, RequestValidationError: on_invalid_body},
    )  # fmt: skip
    app.state.service = service
    app.include_router(router)
    for path in page.paths:
        app.add_api_route(path, page.file, include_in_schema=False)
    add = app.add_middleware
    add(Bodies, service=service)  # the last one added is the outermost
    add(Door, service=service, open_paths=page.paths)
    if service.settings.cors:
        add(
            CORSMiddleware, allow_origins=list(service.settings.cors), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id"],
        )  # fmt: skip
    add(Outermost, service=service)
    return app
