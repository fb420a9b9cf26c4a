"""How models write reasoning and tool calls: a table, one row a way of writing, and the row of a tokenizer's model.

A row says it twice: as patterns, which read what a model wrote and forgive what models get wrong, and as texts, from
which `call_grammars.py` makes the grammar that a model is held to. Where the texts come from: the models' own chat
templates, and for DSML, which has none, the encoder that is published with the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import regex

from ktransformers.server.pieces import mark, pattern

THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Written:
    """A call as text. `{name}` and `{arguments}` stand for themselves, `{number}` for which call it is.

    parameter, unquoted: each argument by itself, where the arguments are not JSON: `{key}` and `{value}`; `unquoted` is
    for one whose schema says string. For JSON both are empty.
    """

    call: str
    begin: str = ""
    between: str = ""
    end: str = ""
    parameter: str = ""
    unquoted: str = ""


@dataclass(frozen=True)
class Format:
    """A way of writing.

    Args:
        name: for messages.
        signs: all of them stand in the chat template, or are tokens, of a model that writes so.
        markers: what a detokenizer must show, where it is a special token: see `answers.Reader.keep`.
        think: around reasoning.
        opens: where a call may begin; a call goes on with `head`.
        head: up to the arguments, with the groups `name` and perhaps `id`. White space before it belongs to it.
        tails: from the arguments to the call's end, the likeliest first.
        more: another call right after one, where that does not begin with `opens`.
        whole: the beginning, with the brace, and the end of a call that is read at once where `head` does not fit.
        parameter: the beginning of an argument with the groups `key` and perhaps `string`, where they are not JSON.
        value_end: the end of such an argument.
        padding: one of these on each side of such an argument is not a part of it.
        bare: a call may be the whole answer, without a mark; only then must its name be a tool's.
        ends_thought: a call may begin inside reasoning, and ends it.
        ids: how calls are named where the model does not: "call_" and 24 hexadecimal digits, Kimi's functions.name:0,
            or the nine letters and digits on which Mistral's templates insist.
    """

    name: str
    signs: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    think: tuple[str, str] = THINK
    opens: regex.Pattern | None = None
    head: regex.Pattern | None = None
    tails: tuple[regex.Pattern, ...] = ()
    more: regex.Pattern | None = None
    whole: tuple[regex.Pattern, regex.Pattern] | None = None
    parameter: regex.Pattern | None = None
    value_end: regex.Pattern | None = None
    padding: str = ""
    bare: bool = False
    ends_thought: bool = False
    ids: Literal["call", "kimi", "nine"] = "call"
    written: Written | None = None


def _opens(*marks: str) -> regex.Pattern:
    return pattern(mark(*marks))


_NAME = r'"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.){1,256})"'
_JSON = rf'\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?P<rest>\{{)'
"""A call as an object of name and arguments, up to the arguments' brace."""
_OTHER_KEYS = r'(?:\s*,\s*"\w{1,64}"\s*:\s*(?:"[^"]{0,256}"|[\w.+-]{1,64})){0,8}\s*\}'

HARMONY = Format(
    "harmony (gpt-oss)",
    signs=("<|channel|>", "<|message|>"),
    markers=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
    think=("", ""),
    written=Written("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"),
)
"""The whole answer is messages on channels: `harmony.py` reads it."""

# V3.2 says function_calls, later models tool_calls; both are seen with two bars
_DSML_BEGIN = r"\s{0,64}+<｜{1,2}DSML｜{1,2}(?:function|tool)_calls>"
_DSML_INVOKE = (
    r'\s*<｜{1,2}DSML｜{1,2}invoke name="(?P<name>[^"<>]{1,256})">'
    r"\s*(?P<rest><｜{1,2}DSML｜{1,2}parameter |</｜{1,2}DSML｜{1,2}invoke>)"
)
_DSML = Format(
    "DSML (DeepSeek V3.2)",
    signs=("｜DSML｜",),
    markers=("｜DSML｜",),
    opens=pattern(_DSML_BEGIN),
    head=pattern(_DSML_BEGIN + _DSML_INVOKE),
    more=pattern(_DSML_INVOKE),
    parameter=pattern(
        r'\s*<｜{1,2}DSML｜{1,2}parameter name="(?P<key>[^"]{1,256})"(?: string="(?P<string>true|false)")?>'
    ),
    value_end=pattern(r"</｜{1,2}DSML｜{1,2}parameter>"),
    tails=(
        pattern(r"\s*</｜{1,2}DSML｜{1,2}invoke>\s*</｜{1,2}DSML｜{1,2}(?:function|tool)_calls>"),
        pattern(r"\s*</｜{1,2}DSML｜{1,2}invoke>"),
    ),
    ends_thought=True,
    written=Written(
        '<｜DSML｜invoke name="{name}">\n{arguments}</｜DSML｜invoke>\n',
        begin="<｜DSML｜function_calls>\n",
        end="</｜DSML｜function_calls>",
        parameter='<｜DSML｜parameter name="{key}" string="false">{value}</｜DSML｜parameter>\n',
        unquoted='<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>\n',
    ),
)

_DEEPSEEK_HEAD = (
    r"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>\s*(?:"
    r"(?P<name>[^\s<]{1,256})<｜tool▁sep｜>\s*(?P<rest>\{)|"  # V3.1
    r"\w{1,64}<｜tool▁sep｜>(?P<name>[^\s<`{]{1,256})\s*```(?:json)?\s*(?P<rest>\{))"  # V3, R1
)
_DEEPSEEK = dict(
    markers=(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    opens=_opens("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    head=pattern(_DEEPSEEK_HEAD),
    tails=(
        pattern(r"\s*(?:```\s*)?<｜tool▁call▁end｜>\s*<｜tool▁calls▁end｜>"),
        pattern(r"\s*(?:```\s*)?<｜tool▁call▁end｜>"),
        pattern(r"\s*(?:```\s*)?<｜tool▁calls▁end｜>"),
        pattern(r"\s*```"),
    ),
    ends_thought=True,
)  # fmt: skip
_KIMI = Format(
    "Kimi K2",
    signs=("<|tool_calls_section_begin|>",),
    markers=(
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    ),
    opens=_opens("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    head=pattern(
        r"\s*(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
        r"(?:(?P<id>functions\.(?P<name>[^\s<:]{1,256}):\d{1,9})|(?:functions\.)?(?P<name>[^\s<:]{1,256})(?::\d{1,9})?)"
        r"\s*<\|tool_call_argument_begin\|>\s*(?P<rest>\{)"
    ),
    tails=(
        pattern(r"\s*<\|tool_call_end\|>\s*<\|tool_calls_section_end\|>"),
        pattern(r"\s*<\|tool_call_end\|>"),
        pattern(r"\s*<\|tool_calls_section_end\|>"),
    ),
    ends_thought=True,
    ids="kimi",
    written=Written(
        "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
    ),
)  # fmt: skip

_INVOKE = r'<invoke name="(?P<name>[^"<>]{1,256})">\s*(?P<rest><parameter |</invoke>)'
_MINIMAX = Format(
    "MiniMax M2",
    signs=("<minimax:tool_call>",),
    markers=("<minimax:tool_call>", "</minimax:tool_call>"),
    opens=_opens("<minimax:tool_call>"),
    head=pattern(rf"\s*<minimax:tool_call>\s*{_INVOKE}"),
    more=pattern(rf"\s*{_INVOKE}"),
    parameter=pattern(r'\s*<parameter name="(?P<key>[^"]{1,256})">'),
    value_end=pattern(r"</parameter>"),
    tails=(pattern(r"\s*</invoke>\s*</minimax:tool_call>"), pattern(r"\s*</invoke>")),
    written=Written(
        '<invoke name="{name}">\n{arguments}</invoke>\n',
        begin="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
        parameter='<parameter name="{key}">{value}</parameter>\n',
        unquoted='<parameter name="{key}">{value}</parameter>\n',
    ),
)

_GLM = Format(
    "GLM 4.5",
    signs=("<arg_key>", "<arg_value>"),
    markers=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    opens=_opens("<tool_call>"),
    head=pattern(r"\s*<tool_call>\s*(?P<name>[^\s<>{}\"]{1,256})\s*(?P<rest><arg_key>|</tool_call>)"),
    parameter=pattern(r"\s*<arg_key>\s*(?P<key>[^<]{1,256}?)\s*</arg_key>\s*<arg_value>"),
    value_end=pattern(r"</arg_value>"),
    tails=(pattern(r"\s*</tool_call>"),),
    written=Written(
        "<tool_call>{name}\n{arguments}</tool_call>",
        between="\n",
        parameter="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
        unquoted="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
)

_QWEN_CODER = Format(
    "Qwen3-Coder",
    signs=("<function=", "<parameter="),
    markers=("<tool_call>", "</tool_call>"),
    opens=_opens("<tool_call>", "<function="),
    head=pattern(
        r"\s*(?:<tool_call>\s*)?<function=(?P<name>[^\s<>]{1,256})>\s*(?P<rest><parameter=|</function>|</tool_call>)"
    ),
    parameter=pattern(r"\s*<parameter=(?P<key>[^<>\n]{1,256})>"),
    value_end=pattern(r"\n?</parameter>"),
    padding="\n",
    tails=(
        pattern(r"\s*</function>\s*</tool_call>"),
        pattern(r"\s*</function>"),
        pattern(r"\s*</tool_call>"),
    ),
    written=Written(
        "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
        between="\n",
        parameter="<parameter={key}>\n{value}\n</parameter>\n",
        unquoted="<parameter={key}>\n{value}\n</parameter>\n",
    ),
)

_HERMES = Format(
    "Hermes (Qwen 2.5, Qwen 3)",
    signs=("<tool_call>",),
    markers=("<tool_call>", "</tool_call>"),
    opens=_opens("<tool_call>"),
    head=pattern(rf"\s*<tool_call>\s*{_JSON}"),
    whole=(pattern(r"\s*<tool_call>\s*\{"), pattern(r"</tool_call>")),
    tails=(
        pattern(rf"{_OTHER_KEYS}\s*</tool_call>"),
        pattern(r"\s*\}\s*\}\s*</tool_call>"),  # one brace too many is the commonest slip
        pattern(r"\s*</tool_call>"),
        pattern(r"\s*\}"),
    ),
    written=Written(
        '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
        between="\n",
    ),
)

_MISTRAL = dict(
    signs=("[TOOL_CALLS]",),
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    think=("[THINK]", "[/THINK]"),
    opens=_opens("[TOOL_CALLS]"),
    ids="nine",
)
_LLAMA = Format(
    "Llama 3",
    signs=("<|start_header_id|>", '"parameters"'),
    markers=("<|python_tag|>",),
    opens=_opens("<|python_tag|>"),
    head=pattern(rf"\s*(?:<\|python_tag\|>)?\s*{_JSON}"),
    more=pattern(rf"\s*[;,]?\s*{_JSON}"),
    tails=(pattern(_OTHER_KEYS),),
    bare=True,
    written=Written('{"name": "{name}", "parameters": {arguments}}', between="; "),
)

PLAIN = Format("plain text")
"""A model that is told of no tools."""

FORMATS = (
    HARMONY,
    _DSML,
    Format(
        "DeepSeek V3 and R1",
        signs=("<｜tool▁calls▁begin｜>", "```json"),
        written=Written(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            between="\n",
            end="<｜tool▁calls▁end｜>",
        ),
        **_DEEPSEEK,
    ),
    Format(
        "DeepSeek V3.1",
        signs=("<｜tool▁calls▁begin｜>",),
        written=Written(
            "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
        ),
        **_DEEPSEEK,
    ),
    _KIMI,
    _MINIMAX,
    _GLM,
    _QWEN_CODER,
    _HERMES,
    Format(
        "Mistral with [ARGS]",
        head=pattern(
            r"\s*\[TOOL_CALLS\]\s*(?P<name>[^\s\[\]{}]{1,256})(?:\s*\[CALL_ID\]\s*(?P<id>\w{1,64}))?\s*(?:\[ARGS\])?\s*(?P<rest>\{)"
        ),
        written=Written("[TOOL_CALLS]{name}[ARGS]{arguments}"),
        **(_MISTRAL | dict(signs=("[TOOL_CALLS]", "[ARGS]"))),
    ),
    Format(
        "Mistral",
        head=pattern(rf"\s*\[TOOL_CALLS\]\s*\[\s*{_JSON}"),
        more=pattern(rf"\s*,\s*{_JSON}"),
        tails=(pattern(rf"{_OTHER_KEYS}\s*\]"), pattern(rf"{_OTHER_KEYS}(?P<rest>\s*,)"), pattern(_OTHER_KEYS)),
        written=Written(
            '{"name": "{name}", "arguments": {arguments}}', begin="[TOOL_CALLS][", between=", ", end="]"
        ),
        **_MISTRAL,
    ),
    _LLAMA,
)
"""The first row whose signs a model has is its format."""


def template_text(tokenizer: Any) -> str:
    """The text of all chat templates of a tokenizer, which may have none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)


def of(tokenizer: Any) -> Format:
    """How the model of this tokenizer writes: by its chat template, or by its tokens where there is no template."""
    text = template_text(tokenizer) or "\n".join(tokenizer.get_added_vocab())
    rows: Iterable[Format] = (row for row in FORMATS if all(sign in text for sign in row.signs))
    return next(iter(rows), PLAIN)


def thinks(tokenizer: Any, format: Format) -> bool:
    """Whether the model may write reasoning between `format.think`."""
    end = format.think[1]
    return bool(end) and (end in template_text(tokenizer) or end in tokenizer.get_added_vocab())
