"""/v1/chat/completions. What makes a run of a chat is used by the endpoints of other shapes too."""

import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from ktransformers import __version__
from ktransformers.server import answers, scores, wishes
from ktransformers.server.answers import Content, Piece, Reasoning
from ktransformers.server.choice import Delta
from ktransformers.server.encoding import JsonResponse
from ktransformers.server.errors import ApiError, error_object
from ktransformers.server.forms import constraint_of, form_of
from ktransformers.server.middleware import log
from ktransformers.server.parts import Call, Parts
from ktransformers.server.prompts import Conversation, Prompted, of_messages
from ktransformers.server.run import Asked, Run, Started, Update, Usage
from ktransformers.server.schemas import ChatRequest, NamedTool
from ktransformers.server.service import Served, Service
from ktransformers.server.streaming import DONE, EventStream, Whole, event, gathered

FINGERPRINT = f"ktransformers-{__version__}"


# ---- from a request to a run -------------------------------------------------------------------------------


async def run_of(service: Service, body: ChatRequest) -> Run:
    """The run that answers a chat, not started. Raises ApiError for a request that cannot be answered."""
    served, limits = service.ready(), service.settings.limits
    if (body.n or 1) > limits.choices:
        raise ApiError(400, f"n: found {body.n}, expected at most {limits.choices}.", param="n")
    stops = wishes.stops_for(body, served, limits)
    conversation = conversation_of(body)
    service.check_fits(conversation.size())
    form, choice = form_of(body), _choice(body)
    work = functools.partial(_prepared, served, body, conversation, form, choice)
    long = bool(form) or choice not in (None, "none", "auto")
    prompt = await service.text_work(conversation.size(), work, long)
    note_prompt(service, prompt.text)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    adapter = service.adapter_for(body.model)
    requests = wishes.requests_for(served, body, [prompt], wanted, logprobs=logprobs, adapter=adapter)
    reader = functools.partial(_reader, served.tokenizer, body)
    return Run(service, Asked([prompt], requests, stops, reader, joined=conversation.continued))


def _prepared(
    served: Served, body: ChatRequest, conversation: Conversation, form: Mapping[str, Any], choice: Any
) -> Prompted:
    """Prompt and constraint: what takes time by the size of what was sent."""
    prompt = of_messages(served.tokenizer, conversation)
    parallel = body.parallel_tool_calls is not False
    return replace(prompt, constraint=constraint_of(served, form, prompt.text, _tools(body), choice, parallel))


def conversation_of(body: ChatRequest) -> Conversation:
    """What the chat template is given."""
    arguments = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            arguments.setdefault("enable_thinking", False)
    continued = bool(body.continue_final_message)
    if continued and (body.add_generation_prompt or body.messages[-1].role != "assistant"):
        raise ApiError(
            400, "continue_final_message: expected a last message of the assistant, and add_generation_prompt false.",
            param="continue_final_message",
        )  # fmt: skip
    return Conversation(body.messages, _tools(body), arguments, body.add_generation_prompt is not False, continued)


def _tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools as templates and readers want them; none where none may be called."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _choice(body: ChatRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        if choice.function.name not in {tool.function.name for tool in body.tools or ()}:
            text = f"tool_choice: there is no tool {choice.function.name[:100]!r} among tools."
            raise ApiError(400, text, param="tool_choice")
        return choice.model_dump()
    return choice


def _reader(tokenizer: Any, body: ChatRequest, prompt_text: str) -> answers.Reader:
    return answers.reader(tokenizer, prompt_text, _tools(body), _choice(body), body.parallel_tool_calls is not False)


def note_prompt(service: Service, text: str) -> None:
    """Log a prompt where the server was started to."""
    if service.settings.log_prompts:
        log.info("prompt %r", text)


# ---- from a run to a response ------------------------------------------------------------------------------


async def answer(service: Service, body: ChatRequest, request: Request) -> Response:
    """The endpoint."""
    shape = Shape(service, service.name_for(body.model), bool(body.logprobs))
    run = await run_of(service, body)
    run.start()
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(run, ChatFrames(shape, run.n, usage))
    return JsonResponse(shape.whole(await gathered(run, request), run.usage()))


def finish_of(finish: str, calls: bool) -> str:
    """OpenAI's finish_reason."""
    return "tool_calls" if finish == "stop" and calls else finish


class Shape:
    """The objects of one answer."""

    def __init__(self, service: Service, model: str, logprobs: bool) -> None:
        self._service, self._logprobs = service, logprobs
        self._id, self._created, self._model = "chatcmpl-" + secrets.token_hex(12), int(time.time()), model

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def whole(self, whole: Whole, usage: Usage) -> dict[str, Any]:
        choices = [self._choice(delta) for delta in whole.choices]
        return self.head("chat.completion") | {"choices": choices, "usage": usage.openai(), "kt": usage.kt()}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        parts = Parts.of(delta.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["content"] = parts.content or None
            message["tool_calls"] = [_called(call) for call in parts.calls.values()]
        return {
            "index": delta.choice, "message": message, "logprobs": self.logprobs(delta),
            "finish_reason": finish_of(delta.finish or "stop", bool(parts.calls)),
        }  # fmt: skip

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return scores.of_chat(self._service.vocabulary(), delta.scored) if self._logprobs else None


def _called(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatFrames:
    """Chunks: first the role, then what comes, then why it ended, then usage where it was asked for."""

    def __init__(self, shape: Shape, n: int, usage: bool) -> None:
        self._shape, self._n, self._usage = shape, n, usage
        self._head = shape.head("chat.completion.chunk")
        self._calls: set[tuple[int, int]] = set()  # (choice, call) whose name was sent

    def update(self, update: Update) -> bytes:
        if isinstance(update, Started):
            return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self._n))
        frames = self._pieces(update)
        if update.finish:
            called = any(choice == update.choice for choice, _ in self._calls)
            frames.append(self._chunk(update.choice, {}, finish=finish_of(update.finish, called)))
        return b"".join(frames)

    def _pieces(self, delta: Delta) -> list[bytes]:
        found = joined(delta.pieces)
        logprobs = self._shape.logprobs(delta) if delta.scored else None
        if logprobs and not found:
            found = [Content("")]
        chunks = []
        for piece in found:
            chunks.append(self._chunk(delta.choice, self._piece(delta.choice, piece), logprobs))
            logprobs = None  # with the first
        return chunks

    def _piece(self, choice: int, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, Reasoning):
            return {"reasoning_content": piece.text}
        call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
        if (choice, piece.index) not in self._calls:
            self._calls.add((choice, piece.index))
            call |= {"id": piece.id, "type": "function"}
            call["function"] = {"name": piece.name, **call["function"]}
        return {"tool_calls": [call]}

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
        return event(self._head | {"choices": choices} | ({"usage": None} if self._usage else {}))

    def closing(self, usage: Usage) -> bytes:
        last = {"choices": [], "usage": usage.openai(), "kt": usage.kt()}
        return (event(self._head | last) if self._usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error_object(error, "")) + DONE


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of the same kind as one: a reader that is behind gets fewer, longer events."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, (Content, Reasoning)) and type(piece) is type(last):
            found[-1] = type(piece)(last.text + piece.text)
        else:
            found.append(piece)
    return found
