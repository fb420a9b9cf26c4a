"""Tool calls as a grammar in llguidance's Lark: the marks of a format around arguments that follow the tool's schema.

Every row of `formats.FORMATS` can be written so, with what JSON loses where arguments are not JSON: a string is free
text up to its end mark (an `enum` is kept; patterns and lengths are not), only arguments that the schema names are
allowed, each once, in the schema's order. Harmony allows one call, since its calls end with a stop token.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ktransformers.server import arguments
from ktransformers.server.formats import HARMONY, Format

TEXT = "/(.|\\n)*/"
"""Any text; no special token, all of which are outside of what a pattern of llguidance can match."""

SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""White space between JSON's tokens: enough to indent, and too little to fill an answer with, which small models do."""


def inline_json(schema: dict, root: dict | None = None) -> str:
    """A schema within a grammar. `root` has what its references refer to."""
    defined = {key: root[key] for key in ("$defs", "definitions") if root and key in root}
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": SPACE}, **defined, **schema})


class Marks:
    """Texts with the special tokens of a tokenizer in them, as Lark. `special`: text -> id."""

    def __init__(self, special: Mapping[str, int]):
        self.special = special
        longest = sorted(map(re.escape, special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest)})" if longest else "($^)")

    def parts(self, text: str) -> list[str]:
        parts = [part for part in self._split.split(text) if part]
        return [f"<[{self.special[part]}]>" if part in self.special else _string(part) for part in parts]

    def lark(self, text: str) -> str:
        return " ".join(self.parts(text))


def rules(format: Format, tools: Mapping[str, dict], marks: Marks, many: bool) -> str:
    """Lark rules of which `calls` is a call of one of `tools`, or several where there may be `many`."""
    written = format.written
    lines = [
        rule for index, (name, schema) in enumerate(tools.items()) for rule in _call(format, index, name, schema, marks)
    ]
    more = f" ({marks.lark(written.between)} call)*" if many and format is not HARMONY else ""
    return "\n".join(
        [
            f"calls: {marks.lark(written.begin)} call{more} {marks.lark(written.end)}",
            f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}",
            *lines,
        ]
    )


def _call(format: Format, index: int, name: str, schema: dict, marks: Marks) -> list[str]:
    if format.bare:
        return [f"call_{index}: {_bare(name, schema)}"]
    as_json = not format.written.parameter
    name_text = json.dumps(name, ensure_ascii=False)[1:-1] if as_json else name
    fill = {
        "{name}": marks.lark(name_text),
        "{number}": "/[0-9]{1,3}/",
        "{arguments}": inline_json(schema) if as_json else f"arguments_{index}",
    }
    lines = [f"call_{index}: {_filled(format.written.call, fill, marks)}"]
    return lines if as_json else lines + _parameters(format, index, schema, marks)


def _bare(name: str, schema: dict) -> str:
    """A call that is nothing but JSON. It is a schema as a whole: where the answer may be other JSON too, llguidance
    can tell the two apart only if both are made of the same words."""
    call = {"name": {"const": name}, "parameters": schema}
    whole = {"type": "object", "properties": call, "required": list(call), "additionalProperties": False}
    return inline_json(whole, schema)


def _filled(text: str, fill: dict[str, str], marks: Marks) -> str:
    """Lark of a text of `Written`."""
    pieces = re.split(r"(\{\w+\})", text)
    return " ".join(fill[piece] if piece in fill else marks.lark(piece) for piece in pieces if piece)


def _parameters(format: Format, index: int, schema: dict, marks: Marks) -> list[str]:
    whole = arguments.resolve(schema, schema)
    properties = whole.get("properties") or {}
    required = set(whole.get("required") or ())
    names, lines = [], []
    for number, key in enumerate(properties):
        rule = f"argument_{index}_{number}"
        names.append(rule if key in required else f"{rule}?")
        lines += _parameter(format, rule, key, properties[key], schema, marks)
    return [f"arguments_{index}: {' '.join(names) or _string('')}", *lines]


def _parameter(format: Format, rule: str, key: str, schema: Any, root: dict, marks: Marks) -> list[str]:
    kinds = arguments.kinds(schema, root)
    resolved = arguments.resolve(schema, root)
    as_text = not kinds or "string" in kinds
    before, _, after = (format.written.unquoted if as_text else format.written.parameter).partition("{value}")
    begin = marks.lark(before.replace("{key}", key))
    if not as_text:
        return [f"{rule}: {begin} {inline_json(resolved, root)} {marks.lark(after)}"]
    choices = resolved.get("enum") or ([resolved["const"]] if "const" in resolved else [])
    if choices:
        texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        return [f"{rule}: {begin} ({' | '.join(map(_string, texts))}) {marks.lark(after)}"]
    end, *others = marks.parts(after)
    if end.startswith("<["):
        return [f"{rule}: {begin} {rule}_text {end} {' '.join(others)}", f"{rule}_text: {TEXT}"]
    return [f"{rule}: {begin} {rule}_text {' '.join(others)}", f"{rule}_text[lazy]: {TEXT} {end}"]


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
