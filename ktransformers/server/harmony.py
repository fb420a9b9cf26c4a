"""Reads the answers of gpt-oss: messages on channels, such as

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}

The channel `analysis` is reasoning, a message to `functions.` is a call, everything else is content.
"""

import regex

from ktransformers.server.calls import Answer
from ktransformers.server.pieces import Content, Parser, Reasoning, pattern

_HEADER = pattern(
    r"\s*(?:<\|end\|>\s*)?(?:<\|start\|>)?\s*(?:assistant)?\s*(?:to=(?P<to>[^\s<]{1,256}))?\s*"
    r"(?:<\|channel\|>\s*(?P<channel>analysis|commentary|final)\s*(?:to=(?P<to>[^\s<]{1,256}))?\s*)?"
    r"(?:<\|constrain\|>)?\s*(?:json|code)?\s*<\|message\|>"
)
_START = pattern(r"<\|start\|>assistant")
_BETWEEN = pattern(r"<\|(?:start|channel|end|call|return)\|>")
_END = pattern(r"<\|(?:end|call|return)\|>")


def opened(prompt_text: str) -> str:
    """What of the prompt belongs to the answer's first message: a header without text."""
    start = prompt_text.rfind("<|start|>assistant")
    tail = prompt_text[start:] if start >= 0 else ""
    return tail if not tail.partition("<|message|>")[2] else ""


def read(answer: Answer) -> Parser[None]:
    source = answer.source
    while not answer.over:
        found = yield from source.match(_HEADER)
        if found is None:
            if source.text.startswith("<|", source.at) and source.drop_beginning(_HEADER):
                return
            stray = yield from source.match(_START, _BETWEEN)  # a header that is none: its words are content
            if stray is None and (yield from source.until(_BETWEEN, Content)) is None:
                return
            continue
        yield from _message(answer, found)


def _message(answer: Answer, header: regex.Match) -> Parser[None]:
    source = answer.source
    to, channel = header["to"] or "", header["channel"]
    name = to.removeprefix("functions.")
    is_call = bool(answer.tools) and (name != to or name in answer.tools)
    if is_call:
        yield answer.begin(name)
    make = answer.delta if is_call else Reasoning if channel == "analysis" else Content
    yield from source.until(_BETWEEN, make)
    yield from source.match(_END)
    answer.over = is_call and not answer.parallel
