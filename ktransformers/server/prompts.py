"""Prompts: messages by the model's chat template, or plain texts, into token ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from ktransformers.engine.requests import Constraint
from ktransformers.server.errors import ApiError, refused
from ktransformers.server.schemas import Message

_ROLES = {"developer": "system"}
"""OpenAI's newer name -> what templates call it, unless they know that name too."""


@dataclass(frozen=True)
class Prompted:
    """A prompt. `text` is what its ids say; `constraint` makes what an answer to it is held to."""

    ids: list[int]
    text: str
    constraint: Callable[[], Constraint] | None = None


def of_text(tokenizer: Any, text: str, special: bool = True) -> Prompted:
    """A text, with what the tokenizer puts before it where `special`."""
    ids = tokenizer.encode(text, add_special_tokens=special)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ApiError(400, "prompt: found no tokens, expected at least one.", param="prompt")
    return Prompted(ids, text)


def of_ids(tokenizer: Any, ids: Sequence[int], vocab_size: int) -> Prompted:
    """Token ids as they were sent."""
    if not ids:
        raise ApiError(400, "prompt: found no tokens, expected at least one.", param="prompt")
    return Prompted(list(ids), text_of(tokenizer, ids, vocab_size, "prompt"))


def text_of(tokenizer: Any, ids: Sequence[int], vocab_size: int, param: str) -> str:
    """The text of ids. Raises ApiError for one outside the vocabulary."""
    if ids and max(ids) >= vocab_size:
        raise ApiError(400, f"{param}: token {max(ids)} is not below {vocab_size}, the vocabulary's size.", param=param)
    return tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class Conversation:
    """Messages, and how the template is to write them. `arguments`: of the template, by whoever asks."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] | None = None
    generation_prompt: bool = True
    continued: bool = False
    """The last message is the beginning of the answer."""

    def size(self) -> int:
        """About how many characters it has."""
        return sum(len(str(message.content or "")) for message in self.messages) + len(str(self.tools or ""))


def of_messages(tokenizer: Any, conversation: Conversation) -> Prompted:
    """Messages by the chat template. Raises ApiError for those that it refuses."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ApiError(
            400, "messages: the model's tokenizer has no chat template, so messages cannot be told apart. "
            "Use /v1/completions, or serve an instruction-tuned model.", param="messages",
        )  # fmt: skip
    arguments = dict(conversation.arguments or {})
    if arguments and (taken := {*signature(tokenizer.apply_chat_template).parameters, "messages"} & arguments.keys()):
        raise refused(f"chat_template_kwargs.{min(taken)}", "is not the template's to know.")
    continued = conversation.continued
    try:
        text = tokenizer.apply_chat_template(
            [_plain(message, str(template)) for message in conversation.messages],
            tools=list(conversation.tools) if conversation.tools else None,
            add_generation_prompt=conversation.generation_prompt and not continued,
            continue_final_message=continued, tokenize=False, **arguments,
        )  # fmt: skip
    except Exception as error:  # whatever a template raises, it is about what it was given
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise ApiError(400, f"messages: the model's chat template refuses them: {reason}", param="messages") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ApiError(400, "messages: the chat template makes no prompt of them.", param="messages")
    return Prompted(ids, text)


def _plain(message: Message, template: str) -> dict[str, Any]:
    """A message as templates read it: a role, a text, calls with their arguments as objects."""
    role = message.role if message.role in template else _ROLES.get(message.role, message.role)
    plain: dict[str, Any] = {"role": role, "content": content_text(message.content)}
    if message.tool_calls:
        plain["tool_calls"] = [_call(call, i) for i, call in enumerate(message.tool_calls)]
    thought = message.reasoning_content or message.reasoning
    given = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": thought}
    return plain | {name: value for name, value in given.items() if value is not None}


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        where = f"messages.tool_calls.{number}"
        raise ApiError(400, f"{where}: expected a function with a name and arguments.", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a message's content. Raises ApiError for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part(part) for part in content)


def _part(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return part["refusal"]
    found = kind if isinstance(kind, str) else "a part without a type"
    raise ApiError(
        400, f"messages.content: found {found[:100]}, expected parts of type text: this server takes text alone.",
        param="messages",
    )  # fmt: skip
