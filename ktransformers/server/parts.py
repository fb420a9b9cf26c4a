"""A finished answer put together from its pieces: text, reasoning, calls of tools."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ktransformers.server.answers import Content, Piece, Reasoning


@dataclass
class Call:
    """A call of a tool. `arguments`: JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Parts:
    content: str = ""
    reasoning: str = ""
    calls: dict[int, Call] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Parts":
        """The pieces of a whole answer."""
        parts = cls()
        for piece in pieces:
            if isinstance(piece, Content):
                parts.content += piece.text
            elif isinstance(piece, Reasoning):
                parts.reasoning += piece.text
            else:
                call = parts.calls.setdefault(piece.index, Call(piece.id, piece.name or ""))
                call.arguments += piece.arguments
        return parts
