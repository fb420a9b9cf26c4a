"""Reads answers by the `response_template` that a tokenizer ships, with transformers' own parser.

That parser tells a call when it is complete. It raises for one that is malformed; its text is content then, and a new
parser reads on after it.
"""

import json
from copy import deepcopy
from typing import Any

from ktransformers.server.calls import Answer
from ktransformers.server.pieces import Content, Parser, Piece, Reasoning

_REASONING = ("thinking", "reasoning", "reasoning_content")
_CALLS = "tool_calls"


def keep(tokenizer: Any) -> frozenset[int]:
    """All special tokens may be marks, but those that only begin, end or fill a text."""
    plain = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return frozenset(tokenizer.get_added_vocab().values()) - plain


def read(answer: Answer, tokenizer: Any, prompt_text: str, tools: Any) -> Parser[None]:
    template = deepcopy(tokenizer.response_template)
    for field in template.get("fields", {}).values():
        field["optional"] = True  # a missing field would be an error at the end, after which nothing can be read

    def new(prefix: str) -> Any:
        return tokenizer.get_response_parser(template, prefix=prefix, tools=list(tools or ()))

    source, held = answer.source, _Held(answer)
    parser = new(prompt_text)
    for event in parser.initial_events:
        held.event(event)
    while not (source.ended and source.at == len(source.text)):
        if source.at == len(source.text):
            yield None
            continue
        letter = source.text[source.at]  # one by one: an error loses what else was in its text
        source.at += 1
        try:
            events = parser.feed(letter)
        except (ValueError, KeyError, TypeError):
            yield from held.give_up()
            parser = new("")
            continue
        for event in events:
            yield from held.event(event)
        if answer.over:
            return
    try:
        _, events = parser.finalize()
    except (ValueError, KeyError, TypeError):
        yield from held.give_up()
        return
    for event in events:
        yield from held.event(event)


class _Held:
    """Turns the parser's events into pieces, and keeps the text of a region that is not told yet."""

    def __init__(self, answer: Answer):
        self.answer, self.text = answer, ""

    def give_up(self) -> list[Piece]:
        text, self.text = self.text, ""
        return [Content(text)] if text else []

    def event(self, event: dict) -> list[Piece]:
        field = event["field"]
        if event["type"] == "region_chunk":
            if field == _CALLS or event.get("dirty"):
                self.text += event["text"]
                return []
            return [(Reasoning if field in _REASONING else Content)(event["text"])]
        if event["type"] != "region_close" or not self.text:
            return []
        if field != _CALLS or not self.answer.tools:
            return self.give_up()
        self.text = ""
        return self._calls(event["value"])

    def _calls(self, value: Any) -> list[Piece]:
        answer, pieces = self.answer, []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            if answer.over or not isinstance(function.get("name"), str):
                continue
            values = function.get("arguments", {})
            pieces.append(answer.begin(function["name"]))
            pieces.append(answer.delta(values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)))
            answer.over = not answer.parallel
        return pieces
