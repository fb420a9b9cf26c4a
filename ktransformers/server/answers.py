"""What an answer's text is made of. A stand-in that takes all of it for content and holds it to nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


class Reader:
    keep: frozenset[int] = frozenset()
    over = False

    def add(self, text: str) -> list[Piece]:
        return [Content(text)]

    def end(self) -> list[Piece]:
        return []


def reader(tokenizer: Any, prompt_text: str, tools: Sequence[dict] | None, tool_choice: Any, parallel: bool) -> Reader:
    return Reader()


def constraint(
    tokenizer: Any, vocab_size: int, *, tools: Any, tool_choice: Any, prompt_text: str, parallel: bool, stop: Any,
    **form: Any,
) -> Callable[[], Constraint] | None:  # fmt: skip
    if form:
        raise KTransformersError(f"{min(form)}: is not built here.")
    return None
