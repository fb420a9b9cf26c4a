"""The text of an answer as content, reasoning and tool calls, while it comes; and what holds it to a form.

    reader = answers.reader(tokenizer, prompt_text, tools, tool_choice, parallel)
    words = Detokenizer(tokenizer, keep=reader.keep)
    pieces = reader.add(words.add(token)) ... reader.add(words.rest()) + reader.end()

The text must have the marks that the format is made of, and many of them are special tokens. So do not decode with
`skip_special_tokens=True`, and do not with False either, which would show all the others: `reader.keep` names those to
show. A stop token is never a part of the text.

A call is told to the client as soon as its name is read, and its arguments as they come. What does not begin like a
call comes out as content, with its marks; arguments that turn out not to be JSON are passed on as they were written, as
OpenAI's API does, and those of an answer that was cut short end where it ends, without what of a mark was written.
"""

from collections.abc import Sequence
from typing import Any

from ktransformers.server import arguments, calls, formats, harmony, shipped
from ktransformers.server.calls import Answer
from ktransformers.server.constraints import constraint
from ktransformers.server.pieces import Content, Parser, Piece, Reasoning, Source, ToolCall, joined

__all__ = ["Content", "Piece", "Reader", "Reasoning", "ToolCall", "constraint", "reader"]


class Reader:
    """Reads one answer.

    keep: the special tokens that its text must show. format: the name of the format, for people.
    over: the rest of the answer would be thrown away: it may be stopped. After one call, where only one is allowed.
    """

    def __init__(self, parser: Parser[None], answer: Answer, keep: frozenset[int]):
        self._parser, self._answer = parser, answer
        self.keep, self.format = keep, answer.format.name

    @property
    def over(self) -> bool:
        return self._answer.over

    def add(self, text: str) -> list[Piece]:
        """What `text` makes certain. Neighbours of one kind are one piece."""
        if self.over or not text:
            return []
        self._answer.source.add(text)
        return self._run()

    def end(self) -> list[Piece]:
        """What was held back, since more text could have made a mark of it."""
        self._answer.source.ended = True
        return [] if self.over else self._run()

    def _run(self) -> list[Piece]:
        pieces = []
        for piece in self._parser:
            if piece is None:
                break
            pieces.append(piece)
        return joined(pieces)


def reader(
    tokenizer: Any,
    prompt_text: str,
    tools: Sequence[dict] | None = None,
    tool_choice: Any = None,
    parallel: bool = True,
) -> Reader:
    """A reader for the answer to a prompt.

    Args:
        tokenizer: its chat template and tokens tell the format; a `response_template` that it ships goes before that.
        prompt_text: the prompt as the model saw it, with special tokens: it may have begun the reasoning.
        tools, tool_choice: as in OpenAI's API. Without tools, or with "none", no calls are looked for.
        parallel: whether the answer may have several calls.
    """
    wanted = {} if tool_choice == "none" else arguments.functions(tools)
    format = formats.of(tokenizer)
    answer = Answer(Source(), format, wanted, parallel)
    if getattr(tokenizer, "response_template", None):
        return Reader(shipped.read(answer, tokenizer, prompt_text, tools), answer, shipped.keep(tokenizer))
    if format is formats.HARMONY:
        answer.source.add(harmony.opened(prompt_text))
        return Reader(harmony.read(answer), answer, _special(tokenizer, format.markers))
    thinks = formats.thinks(tokenizer, format)
    shown = (*format.think, *(format.markers if wanted else ()))
    return Reader(_marked(answer, thinks, prompt_text), answer, _special(tokenizer, shown))


def _marked(answer: Answer, thinks: bool, prompt_text: str) -> Parser[None]:
    if thinks:
        yield from calls.reasoning(answer, prompt_text.rstrip().endswith(answer.format.think[0]))
    yield from calls.answer_with_calls(answer)


def _special(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    ids = tokenizer.get_added_vocab()
    return frozenset(ids[text] for text in texts if text in ids)
