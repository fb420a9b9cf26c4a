"""What /v1/responses is sent, and the chat that it means."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from ktransformers.server.errors import ApiError, refused
from ktransformers.server.schemas import Body, ChatRequest, Count

_STATELESS = "nothing is kept from one request to the next; send the whole conversation as input."


class ResponsesTool(Body):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningWish(Body):
    effort: str | None = None


class TextWish(Body):
    format: dict[str, Any] | None = None


class ResponsesRequest(Body):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "background": "an answer is given at once.",
        "prompt": "there are no stored prompts; send them as input.",
        "top_logprobs": "is not supported here; use /v1/chat/completions.",
    }

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextWish | None = None
    reasoning: ReasoningWish | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat_request(**fields: Any) -> ChatRequest:
    """A chat of fields from another API. Raises ApiError for those that no chat can have."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(400, f"{where}: {first['msg']}", param=where) from error


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The chat with the same answer."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += _messages(items)
    return chat_request(
        model=body.model, messages=messages, max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature, top_p=body.top_p, tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_tool_choice(body.tool_choice), parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text), reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
    )  # fmt: skip


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: calls, and reasoning, belong to the assistant's message that they stand beside."""
    messages: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            own = assistant()
            if own["content"] is not None or own.get("tool_calls"):
                messages.append(own := {"role": "assistant", "content": None})
            own["content"] = item.get("content")
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = item.get("output")
            content = content if isinstance(content, (str, list)) else json.dumps(content)
            messages.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
        elif kind == "reasoning":
            messages.append({"role": "assistant", "content": None, "reasoning_content": _reasoning(item)})
        else:
            raise refused(f"input: items of type {str(kind)[:100]!r}", "are not supported.")
    return messages


def _reasoning(item: Mapping[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _tool(tool: ResponsesTool) -> dict[str, Any]:
    if tool.type != "function":
        raise refused(f"tools: type {tool.type[:100]!r}", "is not supported, expected function.")
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise refused("tool_choice", "expected none, auto, required, or a function by name.")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _format(text: TextWish | None) -> dict[str, Any] | None:
    """`text.format` as a chat's response_format: the schema lies one level deeper there."""
    given = text.format if text else None
    if not given or given.get("type") == "text":
        return None
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
