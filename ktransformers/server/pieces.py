"""What an answer is made of, and the text of an answer as it comes: the two things that every format's parser uses.

A parser is a generator: it yields pieces, and None where it needs more text. So it reads like a parser of a whole text,
and what it yields cannot depend on how the text was cut.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

import regex  # comes with transformers; unlike `re` it knows "no match yet"


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A part of call `index`. The first part has the name; the arguments of all parts together are one JSON text."""

    index: int
    id: str
    name: str | None
    arguments: str


Piece = Content | Reasoning | ToolCall
T = TypeVar("T")
Parser = Generator[Piece | None, None, T]


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same with neighbours of one kind made one."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, ToolCall):
            if isinstance(last, ToolCall) and last.index == piece.index and piece.name is None:
                out[-1] = replace(last, arguments=last.arguments + piece.arguments)
            else:
                out.append(piece)
        elif type(last) is type(piece):
            out[-1] = type(piece)(last.text + piece.text)
        elif piece.text:
            out.append(piece)
    return out


def pattern(text: str) -> regex.Pattern:
    """A pattern for `Source`. It must end in something that more text cannot lengthen, and nothing in it may match text
    without limit but white space, of which none is given back: each new token tries it again.
    """
    return regex.compile(text.replace(r"\s*", r"\s*+"), regex.DOTALL)


def mark(*texts: str) -> str:
    """Any of these texts, with the white space before it."""
    return rf"\s{{0,64}}+(?:{'|'.join(map(regex.escape, texts))})"


_QUOTED = pattern(r'"|\\.')
_NOT_SPACE = pattern(r"\S")


class Source:
    """The text of an answer that was not read yet, from `at` on. A match is read at once: it is no longer there after a
    `yield`, since text that was read goes away when more comes."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False

    def add(self, text: str) -> None:
        self.text, self.at = self.text[self.at :] + text, 0

    def match(self, *patterns: regex.Pattern) -> Parser[regex.Match | None]:
        """Read what the first of `patterns` that fits here matches, up to its group `rest` where it has one."""
        for one in patterns:
            while (found := one.match(self.text, self.at, partial=not self.ended)) and found.partial:
                yield None
            if found:
                self.at = found.start("rest") if "rest" in one.groupindex else found.end()
                return found
        return None

    def until(self, stop: regex.Pattern, make: Callable[[str], Piece]) -> Parser[regex.Match | None]:
        """Pass on everything before the first match of `stop`, which is not read; all the rest where there is none."""
        while True:
            found = stop.search(self.text, self.at, partial=not self.ended)
            end = found.start() if found else len(self.text)
            if end > self.at:
                yield make(self.text[self.at : end])
                self.at = end
            if found and not found.partial:
                return found
            if self.ended:
                return None
            yield None

    def wait(self, stop: regex.Pattern) -> Parser[regex.Match | None]:
        """Read nothing until the first match of `stop`, or the end of the text, is here."""
        searched = 0  # from `at` on
        while True:
            found = stop.search(self.text, self.at + searched, partial=not self.ended)
            if found and not found.partial or self.ended:
                return found
            searched = (found.start() if found else len(self.text)) - self.at
            yield None

    def take(self, stop: regex.Pattern) -> Parser[tuple[str, bool]]:
        """Read up to the first match of `stop` and over it: the text before it, and whether there was one."""
        found = yield from self.wait(stop)
        end, after = (found.start(), found.end()) if found else (len(self.text),) * 2
        text, self.at = self.text[self.at : end], after
        return text, found is not None

    def drop_beginning(self, *patterns: regex.Pattern) -> bool:
        """At the end of an answer that was cut short: drop what is left where one of `patterns` might begin so."""
        matches = (one.match(self.text, self.at, partial=True) for one in patterns)
        if cut := self.ended and any(found and found.partial for found in matches):
            self.at = len(self.text)
        return cut

    def skip_space(self) -> Parser[None]:
        while not (found := _NOT_SPACE.search(self.text, self.at)):
            self.at = len(self.text)
            if self.ended:
                return
            yield None
        self.at = found.start()

    def json(self, unquoted: regex.Pattern, make: Callable[[str], Piece]) -> Parser[None]:
        """Pass on a JSON object as it is written, `{` to `}`; less where a match of `unquoted`, which is '"', a bracket
        or what ends the call, shows outside a string that it is broken."""
        depth, quoted = 0, False
        while True:
            begin = self.at
            while True:
                found = (_QUOTED if quoted else unquoted).search(self.text, self.at, partial=not self.ended)
                if found is None or found.partial:
                    self.at = found.start() if found else len(self.text)
                    break
                sign = found[0]
                if not quoted and sign not in '"{}[]':
                    self.at = found.start()
                    break
                self.at = found.end()
                quoted ^= sign == '"'
                depth += 0 if quoted else (sign in "{[") - (sign in "}]")
                if depth == 0 and not quoted:
                    break
            if self.at > begin:
                yield make(self.text[begin : self.at])
            if found and not found.partial or self.ended:
                return
            yield None
