"""Which tokens an answer may have: JSON, a JSON schema, a regular expression, a grammar, a call of a certain tool.

Grammars are llguidance's, which says for each step which tokens of the vocabulary can come next. A model that reasons
first is held to its grammar after that; gpt-oss has its channels in the grammar.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ktransformers.engine.requests import Constraint
from ktransformers.errors import UnsupportedError, did_you_mean
from ktransformers.server import arguments, call_grammars, formats, masks
from ktransformers.server.call_grammars import Marks
from ktransformers.server.masks import ConstraintError

NONE = ("none", "auto", None)
"""Values of tool_choice that force nothing."""


def constraint(
    tokenizer: Any,
    vocab_size: int,
    *,
    response_format: dict | None = None,
    tool_choice: Any = None,
    tools: Sequence[dict] | None = None,
    grammar: str | None = None,
    regex: str | None = None,
    json_schema: dict | str | None = None,
    prompt_text: str | None = None,
    parallel: bool = True,
    stop: Sequence[int] = (),
) -> Callable[[], Constraint] | None:
    """Makes the constraint of one answer, again for each; None where nothing is asked.

    Args:
        tokenizer: a fast one. It is read for llguidance once.
        vocab_size: how many scores the model has for a token: more than the tokenizer has tokens, for some.
        response_format: {"type": "text" | "json_object" | "json_schema"}, as in OpenAI's API.
        tool_choice, tools: "required", or a function's name in an object, forces the format's calls. With "auto" and
            one of the others, an answer is that or calls.
        grammar: in Lark, as llguidance has it. regex: of the whole answer, in the syntax of Rust's crate `regex`.
        json_schema: a schema by itself. At most one of these three and response_format.
        prompt_text: tells whether the prompt began the reasoning. Without it the template's usual prompt does.
        parallel: whether several calls may be forced.
        stop: tokens that may end the answer, besides the tokenizer's.

    Raises ConstraintError for what is no grammar, UnsupportedError without llguidance and for calls where the model is
    told of none.
    """
    content, what = _content(response_format, grammar, regex, json_schema)
    functions = arguments.functions(tools) if tool_choice != "none" else {}
    forced = _forced(tool_choice, functions)
    if content is None and forced is None:
        return None
    format = formats.of(tokenizer)
    if forced is not None and format.written is None:
        raise UnsupportedError(
            f"tool_choice: {_shown(tool_choice)} needs a model that is told how to call tools, and the chat template "
            f'of this one knows none of {", ".join(row.name for row in formats.FORMATS)}. Use "auto" or "none".'
        )
    vocabulary = masks.vocabulary(tokenizer, vocab_size, stop)
    special = {text: id for text, id in tokenizer.get_added_vocab().items() if vocabulary.is_special_token(id)}
    calls = forced if forced is not None else functions if format.written else {}
    many = forced is None or parallel and not isinstance(tool_choice, dict)
    begun = _reasoning_begun(tokenizer, format, prompt_text)
    before = _before(format, Marks(special), begun)
    whole = _whole(format, Marks(special), before, None if forced else content, calls, many)
    matcher = masks.matcher(vocabulary, whole)
    if matcher.is_error():
        raise ConstraintError(_refused(what if forced is None else "tools", matcher.get_error()))

    def new() -> Constraint:
        grammar = masks.Grammar(matcher.deep_copy(), vocabulary.vocab_size)
        return grammar if begun is None else masks.AfterThought(grammar, tokenizer, format.think, begun)

    return new


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


def _content(response_format: Any, grammar: Any, regex: Any, json_schema: Any) -> tuple[dict | None, str]:
    """The grammar of the answer's content, as a part of llguidance's, and which argument asks for it."""
    given = {
        "response_format": response_format, "grammar": grammar, "regex": regex, "json_schema": json_schema,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None and value != {"type": "text"}}
    if len(given) > 1:
        raise ConstraintError(f"{' and '.join(given)}: an answer can follow one of them. Leave the others out.")
    for name, value in given.items():
        if name == "response_format":
            return _json(_schema_asked(value), name), name
        if name == "json_schema":
            return _json(value, name), name
        if not isinstance(value, str) or not value.strip():
            raise ConstraintError(f"{name}: expected a text, found {_shown(value)}.")
        return {"lark_grammar": value if name == "grammar" else masks.lark_of(value)}, name
    return None, ""


def _schema_asked(response_format: Any) -> Any:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        kinds = ("text", "json_object", "json_schema")
        raise ConstraintError(
            f"response_format: expected an object with a type of {', '.join(kinds)}, found {_shown(response_format)}"
            f"{did_you_mean(str(kind), kinds)}."
        )
    inner = response_format.get("json_schema", response_format)
    if not isinstance(inner, dict) or "schema" not in inner:
        raise ConstraintError('response_format: a json_schema needs its schema: {"name": ..., "schema": {...}}.')
    return inner["schema"]


def _json(schema: Any, name: str) -> dict:
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise ConstraintError(f"{name}: is no JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise ConstraintError(f"{name}: expected a schema, which is an object, found {_shown(schema)}.")
    return {"json_schema": {"x-guidance": {"whitespace_pattern": call_grammars.SPACE}, **schema}}


def _forced(tool_choice: Any, functions: dict[str, dict]) -> dict[str, dict] | None:
    """The functions of which one must be called; None where nothing forces a call."""
    if tool_choice in NONE:
        return None
    if not functions:
        raise ConstraintError(f"tool_choice: {_shown(tool_choice)} needs tools.")
    if tool_choice == "required":
        return functions
    chosen = tool_choice.get("function", tool_choice) if isinstance(tool_choice, dict) else {}
    name = chosen.get("name") if isinstance(chosen, dict) else None
    if not isinstance(name, str):
        raise ConstraintError(
            'tool_choice: expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
            f"found {_shown(tool_choice)}."
        )
    if name not in functions:
        raise ConstraintError(f"tool_choice: there is no tool {name!r}{did_you_mean(name, functions)}.")
    return {name: functions[name]}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _refused(what: str, error: str) -> str:
    lines = [line for line in error.split("<state")[0].strip().splitlines() if line.strip()]
    advice = (
        " Leave those keywords out; what they say is not enforced." if "nimplemented" in error
        else " The grammar is llguidance's Lark." if what == "grammar"
        else " The syntax is that of Rust's regex: no look-around, no back-references." if what == "regex"
        else ""
    )  # fmt: skip
    return f"{what}: cannot be followed: {' '.join(' '.join(lines).split())[:400].rstrip('.')}.{advice}"


def _reasoning_begun(tokenizer: Any, format: formats.Format, prompt_text: str | None) -> bool | None:
    """Whether the answer begins inside reasoning; None where it cannot have any."""
    if format is formats.HARMONY or not formats.thinks(tokenizer, format):
        return None
    if prompt_text is None:
        prompt_text = _usual_prompt(tokenizer)
    begin, end = format.think
    return None if prompt_text.rstrip().endswith(end) else prompt_text.rstrip().endswith(begin)


def _usual_prompt(tokenizer: Any) -> str:
    from jinja2 import TemplateError

    message = {"role": "user", "content": "Hello"}
    try:
        return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError):  # no template, or one that wants more
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# The grammar of the whole answer
# ---------------------------------------------------------------------------------------------------------------------


def _before(format: formats.Format, marks: Marks, begun: bool | None) -> list[str]:
    """Rules of which `before` is what may stand before an answer: line ends after reasoning, gpt-oss's reasoning."""
    if format is formats.HARMONY:
        begin, end = marks.lark("<|channel|>analysis<|message|>"), marks.lark("<|end|><|start|>assistant")
        return [f"before: ({begin} thought {end})?", f"thought: {call_grammars.TEXT}"]
    return ['before: ""' if begun is None else "before: /\\n{0,2}/"]


def _whole(
    format: formats.Format, marks: Marks, before: list[str], content: dict | None, calls: dict[str, dict], many: bool
) -> str:
    """Calls, or content, or either, after what may stand before."""
    choices, grammars, lines = [], [], list(before)
    if content is not None:
        grammars.append({"name": "content", **content})
        choices.append("content")
        final = "<|channel|>final<|message|>" if format is formats.HARMONY else ""
        lines.append(f"content: {marks.lark(final)} @content")
    if calls:
        choices.append("calls")
        lines.append(call_grammars.rules(format, calls, marks, many))
    lines.append(f"start: before ({' | '.join(choices)})")
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": "\n".join(lines)}, *grammars]})
