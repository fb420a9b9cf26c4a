"""Reads answers in which calls stand between marks, by a row of `formats.FORMATS`."""

import json
import secrets
import string
from dataclasses import dataclass, field
from functools import cache

import regex

from ktransformers.server import arguments
from ktransformers.server.formats import Format
from ktransformers.server.pieces import Content, Parser, Reasoning, Source, ToolCall, mark, pattern


@dataclass
class Answer:
    """What the parser of one answer knows and counts.

    Args:
        tools: name -> schema of its arguments; empty where no call is wanted.
        parallel: whether there may be a second call.
        over: nothing that comes after this is a part of the answer.
    """

    source: Source
    format: Format
    tools: dict[str, dict]
    parallel: bool = True
    calls: int = 0
    over: bool = False
    _id: str = field(default="", init=False)

    def begin(self, name: str, id: str | None = None) -> ToolCall:
        """The first piece of the next call."""
        self._id = id or new_id(self.format.ids, name, self.calls)
        self.calls += 1
        return ToolCall(self.calls - 1, self._id, name, "")

    def delta(self, text: str) -> ToolCall:
        return ToolCall(self.calls - 1, self._id, None, text)


def new_id(kind: str, name: str, index: int) -> str:
    if kind == "kimi":
        return f"functions.{name}:{index}"
    if kind == "nine":
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return "call_" + secrets.token_hex(12)


@cache
def _mark(text: str) -> regex.Pattern:
    return pattern(mark(text))


@cache
def _unquoted(format: Format) -> regex.Pattern:
    """What matters in JSON outside strings: quotes, brackets, and the mark after which it cannot go on."""
    ends = [text for text in format.markers if text.startswith("</") or text.endswith(("end｜>", "end|>"))]
    return pattern("|".join(map(regex.escape, ('"', "{", "}", "[", "]", *ends))))


_NEWLINE = pattern(r"\n")
_NEVER = pattern(r"(?!)")


def reasoning(answer: Answer, opened: bool) -> Parser[None]:
    """Read reasoning, where the answer begins with it or the prompt did."""
    source, (begin, end) = answer.source, answer.format.think
    if not opened and (yield from source.match(_mark(begin))) is None:
        return
    yield from source.skip_space()
    stop = _mark(end)
    if answer.format.ends_thought and answer.tools:
        stop = pattern(f"{stop.pattern}|{answer.format.opens.pattern}")
    found = yield from source.until(stop, Reasoning)
    if found and found[0].strip() == end:
        source.at += len(found[0])
        while (yield from source.match(_NEWLINE)):  # templates put some between the two
            pass


def answer_with_calls(answer: Answer) -> Parser[None]:
    """Read all that follows the reasoning."""
    source, format = answer.source, answer.format
    if not answer.tools or format.opens is None:
        yield from source.until(_NEVER, Content)
        return
    if format.bare:
        yield from _calls(answer)
    while not answer.over and (found := (yield from source.until(format.opens, Content))):
        if not (yield from _calls(answer)):  # not as a call is written: text, like all else
            yield Content(found[0])
            source.at += len(found[0])


def _calls(answer: Answer) -> Parser[bool]:
    """Read the calls that begin here; False, and nothing is read, where none does."""
    source, format = answer.source, answer.format
    found = yield from source.match(format.head)
    if found and not _known(answer, found):
        source.at, found = found.start(), None
    if found is None:
        done = format.whole is not None and (yield from _whole(answer))
        if not done:
            return False
    while found:
        yield from _one(answer, found)
        found = None
        if format.more and answer.parallel and (found := (yield from source.match(format.more))):
            if not _known(answer, found):
                source.at, found = found.start(), None
    answer.over = not answer.parallel
    yield from source.skip_space()
    return True


def _known(answer: Answer, found: regex.Match) -> bool:
    return not answer.format.bare or _name(found) in answer.tools


def _name(found: regex.Match) -> str:
    """A name may be written with JSON's escapes."""
    try:
        return json.loads(f'"{found["name"]}"') if "\\" in found["name"] else found["name"]
    except ValueError:
        return found["name"]


def _one(answer: Answer, found: regex.Match) -> Parser[None]:
    source, format = answer.source, answer.format
    name, groups = _name(found), found.groupdict()
    yield answer.begin(name, groups.get("id"))
    if format.parameter:
        yield from _parameters(answer, answer.tools.get(name, {}))
        return
    yield from source.json(_unquoted(format), answer.delta)
    yield from source.match(*format.tails)
    source.drop_beginning(*format.tails)


def _whole(answer: Answer) -> Parser[bool]:
    """Read a call whose JSON is not in the usual order, or has its arguments as a string."""
    source, (begin, end) = answer.source, answer.format.whole
    found = yield from source.match(begin)
    if found is None:
        return False
    source.at = found.start()
    found = yield from source.wait(end)
    if found is None:
        return False
    text = source.text[source.at : found.start()]
    try:
        call = json.loads(text[text.index("{") :])
        values = call.get("arguments", call.get("parameters", {}))
        values = json.loads(values) if isinstance(values, str) else values
    except (ValueError, RecursionError):
        call, values = {}, None
    if not isinstance(call.get("name"), str) or not isinstance(values, dict):
        return False
    source.at = found.end()
    yield answer.begin(call["name"])
    yield answer.delta(json.dumps(values, ensure_ascii=False))
    return True


def _parameters(answer: Answer, schema: dict) -> Parser[None]:
    """Read arguments that are not JSON, up to the end of the call. Where the answer is cut short so is their JSON."""
    source, format = answer.source, answer.format
    yield answer.delta("{")
    separator = ""
    while found := (yield from source.match(format.parameter)):
        key, as_string = found["key"], found.groupdict().get("string")
        allowed = arguments.kinds(arguments.parameter(schema, key), schema)
        if as_string:
            allowed = {"string"} if as_string == "true" else allowed - {"string"}
        yield answer.delta(f'{separator}"{arguments.quoted(key)}": ')
        separator = ", "
        yield from _value(answer, allowed)
    if not (yield from source.match(*format.tails)) and source.drop_beginning(format.parameter, *format.tails):
        return
    yield answer.delta("}")
    source.drop_beginning(*format.tails)


def _value(answer: Answer, allowed: set[str]) -> Parser[None]:
    source, format = answer.source, answer.format
    if format.padding:
        yield from source.match(pattern(format.padding))
    if allowed == {"string"}:  # a long one, such as a file, is worth streaming
        yield answer.delta('"')
        found = yield from source.until(format.value_end, lambda text: answer.delta(arguments.quoted(text)))
        if found:
            source.at += len(found[0])
            yield answer.delta('"')
        return
    text, closed = yield from source.take(format.value_end)
    yield answer.delta(arguments.cast(text, allowed) if closed else f'"{arguments.quoted(text)}')
