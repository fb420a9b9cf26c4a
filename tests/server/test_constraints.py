"""An answer that is held to a grammar follows it whatever the model would say, and what the formats write is in theirs."""

import json
import sys

import jsonschema
import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoTokenizer

from ktransformers.engine.detokenize import Detokenizer
from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.server import formats, masks
from ktransformers.server.answers import ToolCall, reader
from ktransformers.server.constraints import ConstraintError, constraint

pytest.importorskip("llguidance", reason="pip install ktransformers[serve]")

V = 1600  # more than the tokenizer has tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a", "b", 3]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}},
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
NUMBERS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "required": ["on"], "additionalProperties": False,
        "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}, "where": {"$ref": "#/$defs/w"}},
        "$defs": {"w": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}},
    }}}
    for name in ("first", "second")
]  # fmt: skip


def tokenizer_of(template="", *tokens):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if "<|return|>" in tokens:
        tokenizer.eos_token = "<|return|>"  # the embedded model's is <|end|>, which is a mark here
    return tokenizer


@pytest.fixture(scope="module")
def embedded():
    return tokenizer_of()


def generate(tokenizer, made, seed, favoured=(), steps=600):
    """Token ids that random scores choose under a constraint, until that says the answer must end or may with its end
    token being the likeliest."""
    rng, ids = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        scores = torch.randn(V, generator=rng)
        scores[list(favoured)] += 4
        made.mask(scores)
        token = int(scores.argmax())
        assert scores[token] > -torch.inf and token < len(tokenizer)
        if token == tokenizer.eos_token_id:
            return ids
        ids.append(token)
        if made.accept(token):
            return ids
    raise AssertionError(f"no end: {tokenizer.decode(ids)!r}")


def allows(tokenizer, made, text):
    """Whether a constraint allows this text and then the end."""
    return allows_ids(tokenizer, made, tokenizer.encode(text, add_special_tokens=False))


def allows_ids(tokenizer, made, ids):
    for place, token in enumerate(ids):
        scores = torch.zeros(V)
        made.mask(scores)
        if scores[token] == -torch.inf:
            return False
        if made.accept(token):
            return place == len(ids) - 1
    scores = torch.zeros(V)
    made.mask(scores)
    return bool(scores[tokenizer.eos_token_id] == 0)


@pytest.mark.parametrize("asked", [{"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)},
                                   {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
                                   {"response_format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}], ids=range(4))  # fmt: skip
def test_random_scores_yield_json_of_the_schema(embedded, asked):
    new = constraint(embedded, V, **asked)
    for seed in range(10):
        ids = generate(embedded, new(), seed)
        jsonschema.validate(json.loads(embedded.decode(ids)), SCHEMA)


def test_random_scores_yield_a_json_object(embedded):
    new = constraint(embedded, V, response_format={"type": "json_object"})
    likely = embedded.convert_tokens_to_ids(["}", '"', "]", '"}'])
    for seed in range(10):
        ids = generate(embedded, new(), seed, favoured=[id for id in likely if id])
        assert isinstance(json.loads(embedded.decode(ids)), dict)


def test_a_regex_and_a_grammar_are_followed(embedded):
    for seed in range(10):
        ids = generate(embedded, constraint(embedded, V, regex=r"^[a-c]{2,4}/\d\$$")(), seed)
        text = embedded.decode(ids)
        assert set(text[:-3]) <= set("abc") and text[-3] == "/" and text[-1] == "$"
        ids = generate(embedded, constraint(embedded, V, grammar='start: "yes" | "no" | n\nn: /[0-9]{1,3}/')(), seed)
        assert embedded.decode(ids) in ("yes", "no") or embedded.decode(ids).isdigit()


def test_answers_do_not_share_a_state(embedded):
    new = constraint(embedded, V, regex="ab")
    one, two = new(), new()
    assert allows(embedded, one, "ab") and allows(embedded, two, "ab") and not allows(embedded, new(), "ba")


def test_it_says_when_nothing_may_follow(embedded):
    made = constraint(embedded, V, regex="[ab]c?")()
    (a, c) = (embedded.convert_tokens_to_ids(letter) for letter in "ac")
    assert made.accept(a) is False and made.accept(c) is True


def test_scores_that_no_token_has_are_barred(embedded):
    scores = torch.zeros(V)
    constraint(embedded, V, regex=r"(.|\n)+")().mask(scores)
    assert (scores[len(embedded) :] == -torch.inf).all() and (scores[: len(embedded)] == 0).any()
    fewer = torch.zeros(len(embedded) - 7)
    constraint(embedded, len(fewer), regex=r"(.|\n)+")().mask(fewer)
    assert (fewer == 0).any()


def test_white_space_is_no_way_to_go_on_for_ever(embedded):
    made = constraint(embedded, V, response_format={"type": "json_object"})()
    assert not allows(embedded, made, '{"a":' + "\n" * 100 + "1}")
    assert allows(embedded, constraint(embedded, V, response_format={"type": "json_object"})(), '{\n    "a": {\n        "b": 1\n    }\n}')


def test_nothing_asked_is_no_constraint(embedded):
    assert constraint(embedded, V) is None
    assert constraint(embedded, V, response_format={"type": "text"}, tools=TOOLS, tool_choice="auto") is None
    assert constraint(embedded, V, tools=TOOLS, tool_choice="none") is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(regex="(a"), "regex: cannot be followed: .*unclosed group"),
        (dict(regex="a(?=b)"), "look-around"),
        (dict(regex=""), "regex: expected a text"),
        (dict(regex=3), "regex: expected a text"),
        (dict(grammar="start: nothing"), 'grammar: cannot be followed: .*unknown name: "nothing".* llguidance\'s Lark'),
        (dict(grammar="hello"), "grammar: cannot be followed"),
        (dict(json_schema={"type": "objekt"}), "json_schema: cannot be followed: .*objekt"),
        (dict(json_schema={"not": {"type": "string"}}), 'json_schema: cannot be followed: .*"not".* Leave those keywords out'),
        (dict(json_schema={"$ref": "http://example.com/x"}), "json_schema: cannot be followed"),
        (dict(json_schema="{"), "json_schema: is no JSON"),
        (dict(json_schema=[]), "json_schema: expected a schema"),
        (dict(response_format={"type": "json_objekt"}), "did you mean 'json_object'"),
        (dict(response_format="json"), "response_format: expected an object"),
        (dict(response_format={"type": "json_schema"}), "needs its schema"),
        (dict(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}), "response_format: cannot be followed"),
        (dict(regex="a", json_schema={}), "regex and json_schema: an answer can follow one"),
        (dict(tool_choice="required"), "needs tools"),
        (dict(tool_choice="any", tools=TOOLS), 'found "any"'),
        (dict(tool_choice={"type": "function", "function": {"name": "wether"}}, tools=TOOLS), "did you mean 'weather'"),
        (dict(tool_choice="required", tools=TOOLS), "needs a model that is told how to call tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_a_reason(embedded, asked, message):
    with pytest.raises(KTransformersError, match=message):
        constraint(embedded, V, **asked)


def test_a_tools_schema_that_cannot_be_followed_is_named():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "x"}}}}}]
    with pytest.raises(ConstraintError, match="tools: cannot be followed"):
        constraint(tokenizer_of("<tool_call>"), V, tools=tools, tool_choice="required")


def test_a_token_outside_the_grammar_is_an_error(embedded):
    with pytest.raises(ConstraintError, match="cannot go on within its grammar"):
        constraint(embedded, V, regex="ab")().accept(embedded.convert_tokens_to_ids("z"))


def test_without_llguidance_the_package_is_named(embedded, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install ktransformers\[serve\]"):
        constraint(embedded, V, regex="a")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        chat_template = None

        def get_added_vocab(self):
            return {}

    with pytest.raises(UnsupportedError, match="Slow: .* fast tokenizer"):
        constraint(Slow(), V, regex="a")


def test_a_tokenizer_is_converted_once(embedded):
    assert masks.vocabulary(embedded, V) is masks.vocabulary(embedded, V)
    assert masks.vocabulary(embedded, V) is not masks.vocabulary(embedded, V, stop=[5])


def test_a_models_other_stop_tokens_may_end_an_answer(embedded):
    made, scores = constraint(embedded, V, regex="a*", stop=[5])(), torch.zeros(V)
    made.mask(scores)
    assert scores[5] == 0 and scores[embedded.eos_token_id] == 0 and scores[4] == -torch.inf


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning first
# ---------------------------------------------------------------------------------------------------------------------

THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>{# <think> </think> #}"


@pytest.mark.parametrize("marks_are_tokens", [True, False])
def test_the_grammar_begins_after_the_reasoning_that_the_prompt_began(marks_are_tokens):
    tokenizer = tokenizer_of(THINKER, *(("<think>", "</think>") if marks_are_tokens else ()))
    new = constraint(tokenizer, V, regex="ab", prompt_text="<|assistant|><think>\n")
    assert allows(tokenizer, new(), "What? x</think>\n\nab") and not allows(tokenizer, new(), "What? x</think>ba")
    made, scores = new(), torch.zeros(V)
    made.mask(scores)
    assert (scores == 0).all()
    assert allows(tokenizer, constraint(tokenizer, V, regex="ab", prompt_text="<think>\n\n</think>\n\n")(), "ab")


def test_reasoning_may_come_first_where_the_model_begins_it():
    tokenizer = tokenizer_of(THINKER, "<think>", "</think>")
    for prompt in (None, "<|assistant|>"):
        new = constraint(tokenizer, V, regex="ab", prompt_text=prompt)
        assert allows(tokenizer, new(), "<think>x y</think>ab") and allows(tokenizer, new(), "ab")
        assert allows(tokenizer, new(), "\n<think>x y</think>\nab") and not allows(tokenizer, new(), "ab<think>")
    new = constraint(tokenizer, V, regex="ab", prompt_text="<think></think>")
    assert not allows(tokenizer, new(), "<think>x</think>ab")


def test_the_templates_own_prompt_tells_whether_it_begins_the_reasoning():
    tokenizer = tokenizer_of(THINKER + "<think>", "<think>", "</think>")
    assert allows(tokenizer, constraint(tokenizer, V, regex="ab")(), "x</think>ab")


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
R1 = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
K2 = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>")
PARIS, PARIS_F = '{"city": "Paris", "days": 3}', '{"city": "Paris", "unit": "F"}'
FORMATS = {  # id: template, special tokens, two calls as the model's template writes them (one for harmony)
    "hermes": ("<tool_call>", (), f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'),
    "hermes with tokens": ("<tool_call>", ("<tool_call>", "</tool_call>"), f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'),
    "coder": ("<function= <parameter=", ("<tool_call>", "</tool_call>"), "<tool_call>\n<function=weather>\n<parameter=city>\nPa\n</b>ris\n</parameter>\n<parameter=unit>\nF\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"),
    "r1": ("<｜tool▁calls▁begin｜> ```json", R1, f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "v3.1": ("<｜tool▁calls▁begin｜>", R1, f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "v3.2": ("｜DSML｜", ("｜DSML｜",), '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'),
    "glm": ("<arg_key> <arg_value>", ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"),
    "kimi": ("<|tool_calls_section_begin|>", K2, f"<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|><|tool_calls_section_end|>"),
    "minimax": ("<minimax:tool_call>", ("<minimax:tool_call>", "</minimax:tool_call>"), '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n<parameter name="unit">F</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'),
    "harmony": ("<|channel|> <|message|>", HARMONY, f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{PARIS}"),
    "llama": ('<|start_header_id|> "parameters"', ("<|python_tag|>",), f'{{"name": "weather", "parameters": {PARIS_F}}}; {{"name": "now", "parameters": {{}}}}'),
    "mistral": ("[TOOL_CALLS]", ("[TOOL_CALLS]",), f'[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]'),
    "mistral with args": ("[TOOL_CALLS] [ARGS]", ("[TOOL_CALLS]", "[ARGS]"), f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}"),
}  # fmt: skip
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def test_every_format_is_here():
    assert {formats.of(tokenizer_of(template)).name for template, *_ in FORMATS.values()} == {row.name for row in formats.FORMATS}


@every_format
def test_what_a_format_writes_is_in_its_grammar(format):
    template, tokens, text = format
    tokenizer = tokenizer_of(template, *tokens)
    assert allows(tokenizer, constraint(tokenizer, V, tools=TOOLS, tool_choice="required")(), text)
    for without in ("Hello", text.replace("Paris", "\x00"), text.replace("weather", "wether"), text.replace("now", "then")):
        if without != text and not ("\x00" in without and formats.of(tokenizer).written.parameter):  # a string is free text
            assert not allows(tokenizer, constraint(tokenizer, V, tools=TOOLS, tool_choice="required")(), without), without


@every_format
def test_one_call_where_one_is_asked(format):
    template, tokens, text = format
    tokenizer = tokenizer_of(template, *tokens)
    named = constraint(tokenizer, V, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    single = constraint(tokenizer, V, tools=TOOLS, tool_choice="required", parallel=False)
    assert not allows(tokenizer, named(), text)
    assert "harmony" in formats.of(tokenizer).name or not allows(tokenizer, single(), text)


@every_format
def test_random_scores_yield_calls_that_are_read_back_and_follow_the_schema(format):
    template, tokens, _ = format
    tokenizer = tokenizer_of(template, *tokens)
    new = constraint(tokenizer, V, tools=NUMBERS, tool_choice="required")
    for seed in range(4):
        ids = generate(tokenizer, new(), seed, favoured=[tokenizer.eos_token_id])
        one = reader(tokenizer, "", NUMBERS)
        words = Detokenizer(tokenizer, keep=one.keep)
        pieces = one.add("".join(map(words.add, ids)) + words.rest()) + one.end()
        assert pieces and all(isinstance(piece, ToolCall) or "analysis" in tokenizer.decode(ids) for piece in pieces), tokenizer.decode(ids)
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        assert calls
        for call in calls:
            assert call.name in ("first", "second")
            jsonschema.validate(json.loads(call.arguments), NUMBERS[0]["function"]["parameters"])


@every_format
def test_with_auto_an_answer_is_json_or_calls(format):
    template, tokens, text = format
    tokenizer = tokenizer_of(template, *tokens)
    new = constraint(tokenizer, V, tools=TOOLS, tool_choice="auto", response_format={"type": "json_object"})
    final = "<|channel|>final<|message|>" if "harmony" in formats.of(tokenizer).name else ""
    assert allows(tokenizer, new(), final + '{"a": 1}') and allows(tokenizer, new(), text)
    assert not allows(tokenizer, new(), final + "Hello")


def test_gpt_oss_may_think_on_its_channel_first():
    tokenizer = tokenizer_of(FORMATS["harmony"][0], *HARMONY)
    thought = "<|channel|>analysis<|message|>Hm, {<b>.\n<|end|><|start|>assistant"
    new = constraint(tokenizer, V, json_schema={"type": "integer"})
    assert allows(tokenizer, new(), f"{thought}<|channel|>final<|message|>12")
    assert not allows(tokenizer, new(), f"{thought}<|channel|>final<|message|>x")
    assert not allows(tokenizer, new(), "12")
