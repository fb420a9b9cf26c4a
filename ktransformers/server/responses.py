"""/v1/responses: a chat whose answer is a list of items, each opened, filled and closed by events."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from fastapi import Request, Response

from ktransformers.server.answers import Content, Piece, Reasoning
from ktransformers.server.chat import joined, run_of
from ktransformers.server.encoding import JsonResponse
from ktransformers.server.errors import ApiError, error_object
from ktransformers.server.responses_input import ResponsesRequest, chat_of
from ktransformers.server.run import Started, Update, Usage
from ktransformers.server.service import Service
from ktransformers.server.streaming import EventStream, event, gathered

Event = tuple[str, dict[str, Any]]


async def answer(service: Service, body: ResponsesRequest, request: Request) -> Response:
    """The endpoint."""
    shape = Shape(service, body)
    run = await run_of(service, chat_of(body))
    run.start()
    if body.stream:
        return EventStream(run, ResponseFrames(shape))
    whole = await gathered(run, request)
    output = Output()
    for piece in joined(whole.choices[0].pieces):
        list(output.add(piece))
    list(output.end())
    return JsonResponse(shape.of(_status(whole.choices[0].finish), output.items, run.usage()))


def _status(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


class Shape:
    """The response object, at any time of its life."""

    def __init__(self, service: Service, body: ResponsesRequest) -> None:
        self._body, self._model = body, service.name_for(body.model)
        self._id, self._created = "resp_" + secrets.token_hex(16), int(time.time())

    def of(
        self, status: str, items: list[dict[str, Any]], usage: Usage | None = None, error: str | None = None
    ) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "background": False,
            "error": {"code": "server_error", "message": error} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self._model,
            "output": items, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": body.temperature, "top_p": body.top_p,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "truncation": "disabled", "metadata": body.metadata or {},
            "tools": [tool.model_dump() for tool in body.tools or ()], "usage": usage and _usage(usage),
        }  # fmt: skip


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.new_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
    }


class Output:
    """The items of an answer as they come, and the events that tell of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""  # what is being filled: "content", "reasoning", or a call's number

    def add(self, piece: Piece) -> Iterator[Event]:
        """The events of a piece."""
        if isinstance(piece, Content):
            kind, text = "content", piece.text
        elif isinstance(piece, Reasoning):
            kind, text = "reasoning", piece.text
        else:
            kind, text = str(piece.index), piece.arguments
        if kind != self._open:
            yield from self.end()
            self._open = kind
            yield from self._begin(piece)
        if text:
            yield from self._fill(text)

    def _begin(self, piece: Piece) -> Iterator[Event]:
        if isinstance(piece, Content):
            item = {"type": "message", "id": _id("msg"), "status": "in_progress", "role": "assistant", "content": []}
            part: dict[str, Any] | None = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        elif isinstance(piece, Reasoning):
            item = {"type": "reasoning", "id": _id("rs"), "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "function_call", "id": _id("fc"), "status": "in_progress", "call_id": piece.id,
                    "name": piece.name, "arguments": ""}  # fmt: skip
            part = None
        self.items.append(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": item}
        if part is not None:
            item["content"] = [part]
            yield "response.content_part.added", {**self._where(), "part": part}

    def _where(self) -> dict[str, Any]:
        where = {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}
        return where if self.items[-1]["type"] == "function_call" else {**where, "content_index": 0}

    def _fill(self, text: str) -> Iterator[Event]:
        item = self.items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            yield "response.function_call_arguments.delta", {**self._where(), "delta": text}
            return
        part = item["content"][0]
        part["text"] += text
        logprobs = {"logprobs": []} if part["type"] == "output_text" else {}
        yield f"response.{part['type']}.delta", {**self._where(), "delta": text, **logprobs}

    def end(self) -> Iterator[Event]:
        """Close the item that is open."""
        if not self._open:
            return
        self._open, item, where = "", self.items[-1], self._where()
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**where, **done}
        else:
            part = item["content"][0]
            logprobs = {"logprobs": []} if part["type"] == "output_text" else {}
            yield f"response.{part['type']}.done", {**where, "text": part["text"], **logprobs}
            yield "response.content_part.done", {**where, "part": part}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


class ResponseFrames:
    """Events with names and numbers."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._output, self._number, self._finish = shape, Output(), 0, "stop"

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    def update(self, update: Update) -> bytes:
        if isinstance(update, Started):
            response = self._shape.of("in_progress", [])
            names = ("response.created", "response.in_progress")
            return b"".join(self._event(name, {"response": response}) for name in names)
        self._finish = update.finish or self._finish
        events = [one for piece in joined(update.pieces) for one in self._sent(self._output.add(piece))]
        return b"".join(events)

    def _sent(self, events: Iterator[Event]) -> Iterator[bytes]:
        """Each as bytes before the next is made, which changes the item that it shows."""
        return (self._event(*one) for one in events)

    def closing(self, usage: Usage) -> bytes:
        ends = b"".join(self._sent(self._output.end()))
        status = _status(self._finish)
        return ends + self._event(f"response.{status}", {"response": self._shape.of(status, self._output.items, usage)})

    def failure(self, error: ApiError) -> bytes:
        told = error_object(error, "")["error"]
        failed = self._shape.of("failed", self._output.items, error=told["message"])
        return self._event("error", told) + self._event("response.failed", {"response": failed})
