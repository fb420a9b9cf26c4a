"""Anthropic's /v1/messages and /v1/messages/count_tokens: a chat whose answer is a list of blocks."""

import functools
import json
import secrets
from typing import Any

from fastapi import Request, Response

from ktransformers.server.answers import Content, Piece, Reasoning
from ktransformers.server.chat import conversation_of, joined, run_of
from ktransformers.server.encoding import JsonResponse
from ktransformers.server.errors import MESSAGES, ApiError, error_object
from ktransformers.server.messages_input import CountRequest, MessagesRequest, chat_of
from ktransformers.server.parts import Parts
from ktransformers.server.prompts import of_messages
from ktransformers.server.run import Started, Update, Usage
from ktransformers.server.service import Service
from ktransformers.server.streaming import EventStream, event, gathered


async def answer(service: Service, body: MessagesRequest, request: Request) -> Response:
    """The endpoint that answers."""
    head = {
        "id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant",
        "model": service.name_for(body.model),
    }  # fmt: skip
    run = await run_of(service, chat_of(body))
    run.start()
    if body.stream:
        return EventStream(run, MessageFrames(head, request.scope["kt_id"], run.usage))
    delta = (await gathered(run, request)).choices[0]
    parts = Parts.of(delta.pieces)
    ended = _ended(delta.finish, delta.stop, bool(parts.calls))
    return JsonResponse(head | {"content": _blocks(parts)} | ended | {"usage": _usage(run.usage())})


async def count(service: Service, body: CountRequest) -> Response:
    """The endpoint that counts."""
    tokenizer, conversation = service.ready().tokenizer, conversation_of(chat_of(body))
    work = functools.partial(of_messages, tokenizer, conversation)
    prompt = await service.text_work(conversation.size(), work)
    return JsonResponse({"input_tokens": len(prompt.ids)})


def _ended(finish: str | None, stop: str | None, called: bool) -> dict[str, Any]:
    if stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reason = "max_tokens" if finish == "length" else "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: cached tokens beside those of the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.new_tokens,
    }


def _blocks(parts: Parts) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if parts.reasoning:
        blocks.append({"type": "thinking", "thinking": parts.reasoning, "signature": ""})
    if parts.content:
        blocks.append({"type": "text", "text": parts.content})
    for call in parts.calls.values():
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)})
    return blocks


def _arguments(text: str) -> dict[str, Any]:
    """The input of a call, which must be an object; what a model wrote may be anything."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text} if text else {}
    return found if isinstance(found, dict) else {"arguments": found}


class MessageFrames:
    """Events with names: blocks are opened, filled and closed."""

    def __init__(self, head: dict[str, Any], request_id: str, usage: Any) -> None:
        self._head, self._request_id, self._usage = head, request_id, usage
        self._open, self._count, self._called = "", 0, False
        self._ended: dict[str, Any] = {}

    def update(self, update: Update) -> bytes:
        if isinstance(update, Started):
            usage = _usage(self._usage()) | {"output_tokens": 0}
            begun = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            return _event("message_start", message=self._head | begun)
        frames = b"".join(self._piece(piece) for piece in joined(update.pieces))
        if update.finish:
            self._ended = _ended(update.finish, update.stop, self._called)
        return frames

    def _piece(self, piece: Piece) -> bytes:
        if isinstance(piece, Content):
            kind, block = "content", {"type": "text", "text": ""}
            delta = {"type": "text_delta", "text": piece.text}
        elif isinstance(piece, Reasoning):
            kind, block = "reasoning", {"type": "thinking", "thinking": "", "signature": ""}
            delta = {"type": "thinking_delta", "thinking": piece.text}
        else:
            kind, block = str(piece.index), {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
            self._called = True
        begun = b""
        if kind != self._open:
            begun = self._close()
            self._open = kind
            begun += _event("content_block_start", index=self._count, content_block=block)
        return begun + _event("content_block_delta", index=self._count, delta=delta)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open, self._count = "", self._count + 1
        return _event("content_block_stop", index=self._count - 1)

    def closing(self, usage: Usage) -> bytes:
        ended = _event("message_delta", delta=self._ended, usage=_usage(usage))
        return self._close() + ended + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(error_object(error, MESSAGES, self._request_id), "error")


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
