"""What Anthropic's /v1/messages is sent, and the chat that it means."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ktransformers.server.errors import ApiError, refused
from ktransformers.server.responses_input import chat_request
from ktransformers.server.schemas import Body, ChatRequest, Count

Blocks = list[dict[str, Any]]

_TEXT_ALONE = "is not supported: this server takes text alone."


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class AnthropicTool(Body):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: str


class CountRequest(Body):
    """What counts tokens; a request for an answer is one too."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "this server calls no other.",
        "container": "this server runs no code.",
    }

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | Blocks | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None


def chat_of(body: CountRequest) -> ChatRequest:
    """The chat with the same answer. A last message of the assistant is the beginning of the answer, as there."""
    messages = [{"role": "system", "content": _texts(body.system, "system")}] if body.system else []
    for message in body.messages:
        messages += _messages(message)
    choice = body.tool_choice
    arguments = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        arguments.setdefault("enable_thinking", body.thinking.type != "disabled")
    last = messages[-1]
    names = ("temperature", "top_p", "top_k", "max_tokens")
    return chat_request(
        model=body.model, messages=messages, tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_choice(choice) if choice else None, chat_template_kwargs=arguments,
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        continue_final_message=last["role"] == "assistant" and not last.get("tool_calls"),
        stop=getattr(body, "stop_sequences", None), **{name: getattr(body, name, None) for name in names},
    )  # fmt: skip


def _messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """One message as one or several: results of tools are messages of their own in a chat."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, calls, text, thought = [], [], [], []
    for block in message.content:
        kind = block.get("type")
        if kind == "text":
            text.append(_texts([block], "messages.content"))
        elif kind == "tool_result":
            content = _texts(block.get("content") or "", "messages.content")
            results.append({"role": "tool", "content": content, "tool_call_id": block.get("tool_use_id")})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thought.append(block["thinking"])
        elif kind != "redacted_thinking":
            raise refused(f"messages.content: type {str(kind)[:100]!r}", _TEXT_ALONE)
    own: dict[str, Any] = {"role": message.role, "content": "\n".join(text)}
    if calls:
        own["tool_calls"] = calls
    if thought:
        own["reasoning_content"] = "".join(thought)
    return [*results, *([own] if text or calls or thought or not results else [])]


def _texts(content: Any, where: str) -> str:
    """A text, or blocks of text."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str)
        for block in content
    ):
        return "\n".join(block["text"] for block in content)
    raise ApiError(400, f"{where}: expected a string or blocks of type text.", param=where)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise refused(f"tools: type {tool.type[:100]!r}", "is not supported: this server has no tools of its own.")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: AnthropicChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"any": "required"}.get(choice.type, choice.type)
