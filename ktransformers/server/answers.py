"""What an answer's text is made of. A stand-in that takes all of it for content."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ktransformers.engine.requests import Constraint
from ktransformers.errors import KTransformersError


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ToolCall:
    index: int
    id: str
    name: str | None
    arguments: str


Piece = Content | Reasoning | ToolCall


class Reader(Protocol):
    keep: frozenset[int]
    over: bool

    def add(self, text: str) -> list[Piece]: ...
    def end(self) -> list[Piece]: ...


class _Plain:
    keep: frozenset[int] = frozenset()
    over = False

    def add(self, text: str) -> list[Piece]:
        return [Content(text)]

    def end(self) -> list[Piece]:
        return []


def reader(tokenizer: Any, prompt_text: str, tools: list | None, tool_choice: Any, parallel: bool) -> Reader:
    return _Plain()


def constraint(
    tokenizer: Any, vocab_size: int, fields: Mapping[str, Any], tools: list | None = None
) -> Callable[[], Constraint] | None:
    if fields.get("response_format", {}).get("type", "text") != "text":
        raise KTransformersError("response_format: only text is built here.")
    return None
