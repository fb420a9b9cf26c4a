"""Every way of writing reasoning and tool calls is read the same however its text is cut, and no text is lost."""

import json
import random
import re

import pytest
from ktransformers.models import embedded_model
from transformers import AutoTokenizer

from ktransformers.engine.detokenize import Detokenizer
from ktransformers.server import arguments, formats
from ktransformers.server.answers import Content, Reasoning, ToolCall, reader

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "where": {"$ref": "#/$defs/place"},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
                "$defs": {"place": {"type": "object"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


class Told:
    """A tokenizer of which only the template and the added tokens matter."""

    bos_token_id = eos_token_id = pad_token_id = unk_token_id = None

    def __init__(self, template: str, *tokens: str):
        self.chat_template, self.tokens = template, {text: id for id, text in enumerate(tokens)}

    def get_added_vocab(self):
        return self.tokens


HERMES = Told('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> <think> </think>')
CODER = Told("<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>")
R1 = Told("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '```json' </think>")
V31 = Told("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + args </think>")
V32 = Told("", "<｜User｜>", "｜DSML｜", "<think>", "</think>")
GLM = Told("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value> <think></think>")
KIMI = Told("<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<|tool_call_argument_begin|> <think></think>")
MINIMAX = Told("<minimax:tool_call><invoke name=... ><parameter name= </invoke> <think>\n</think>")
GPT_OSS = Told("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>", "<|message|>", "<|call|>", "<|start|>")
LLAMA = Told('<|start_header_id|>{"name": function name, "parameters": dictionary} <|python_tag|>', "<|python_tag|>")
MISTRAL = Told("[TOOL_CALLS] [AVAILABLE_TOOLS]", "[TOOL_CALLS]")
MISTRAL_ARGS = Told("[TOOL_CALLS] [ARGS] [THINK] [/THINK]", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")
PLAIN = Told("{{ messages }}")

PARIS = '{"city": "Paris", "days": 3}'
TRICKY = r'{"city": "a \"}{][\\", "where": {"x": [1, {"y": "</tool_call>"}]}, "metric": true}'
ALL = '"city": "Paris", "days": 3, "metric": true, "where": {"a": [1]}, "limit": null'

CASES = {  # id: tokenizer, end of the prompt, answer, reasoning, content, calls
    "plain": (PLAIN, "", "Hello <tool_call> world\n", "", "Hello <tool_call> world\n", []),
    "hermes": (HERMES, "", f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>', "", "Let me see.", [("weather", PARIS)]),
    "hermes, two after thought": (HERMES, "", f'<think>\nI must ask. {{"name"\n</think>\n\n<tool_call>\n{{"name": "weather", "arguments": {TRICKY}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>', 'I must ask. {"name"', "", [("weather", TRICKY), ("now", "{}")]),
    "hermes, thought opened by the prompt": (HERMES, "<think>\n", "Hm <b>.\n</think>\n\nYes.", "Hm <b>.", "Yes.", []),
    "hermes, only thought": (HERMES, "<think>", "Hm </thin", "Hm </thin", "", []),
    "hermes, other order": (HERMES, "", f'<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>', "", "", [("weather", PARIS)]),
    "hermes, arguments as a string": (HERMES, "", '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>', "", "", [("weather", '{"days": 1}')]),
    "hermes, more keys": (HERMES, "", f'<tool_call>{{"name": "weather", "arguments": {PARIS}, "id": "x"}}</tool_call> Done', "", "Done", [("weather", PARIS)]),
    "hermes, a brace too many": (HERMES, "", f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}}}\n</tool_call>', "", "", [("weather", PARIS)]),
    "hermes, no end": (HERMES, "", f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}\n', "", "", [("weather", PARIS)]),
    "hermes, cut short": (HERMES, "", '<tool_call>{"name": "weather", "arguments": {"city": "Par', "", "", [("weather", '{"city": "Par')]),
    "hermes, cut in the mark": (HERMES, "", f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}\n</tool', "", "", [("weather", PARIS)]),
    "hermes, broken JSON": (HERMES, "", '<tool_call>{"name": "weather", "arguments": {"city": [}\n</tool_call>x', "", "x", [("weather", '{"city": [}\n')]),
    "hermes, malformed": (HERMES, "", "a \n<tool_call>\nnothing\n</tool_call> b", "", "a \n<tool_call>\nnothing\n</tool_call> b", []),
    "hermes, malformed JSON": (HERMES, "", '<tool_call>{"nam": }</tool_call>', "", '<tool_call>{"nam": }</tool_call>', []),
    "hermes, a mark at the end": (HERMES, "", "a < b <tool_cal", "", "a < b <tool_cal", []),
    "coder": (CODER, "", "I'll ask.\n<tool_call>\n<function=weather>\n<parameter=city>\nNew\n\"York\"</parameters>\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", "", "I'll ask.", [("weather", '{"city": "New\\n\\"York\\"</parameters>\\n", "days": 3}')]),
    "coder, no arguments, two": (CODER, "", "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n", "", "", [("now", "{}"), ("now", "{}")]),
    "coder, bare function": (CODER, "", "<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", "", "", [("weather", '{"days": 3}')]),
    "coder, all kinds": (CODER, "", "<tool_call><function=weather><parameter=city>Paris</parameter><parameter=days>3.0</parameter><parameter=metric>True</parameter><parameter=where>{'a': [1]}</parameter><parameter=limit>None</parameter></function></tool_call>", "", "", [("weather", "{" + ALL + "}")]),
    "coder, not as the schema says": (CODER, "", "<function=weather><parameter=days>three</parameter><parameter=other>[1]</parameter></function>", "", "", [("weather", '{"days": "three", "other": [1]}')]),
    "coder, cut short": (CODER, "", "<tool_call>\n<function=weather>\n<parameter=city>\nPar", "", "", [("weather", '{"city": "Par')]),
    "coder, cut between": (CODER, "", "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n<para", "", "", [("weather", '{"days": 3')]),
    "coder, malformed": (CODER, "", "<tool_call>\n<function=weather>\nParis\n</function>\n</tool_call>", "", "<tool_call>\n<function=weather>\nParis\n</function>\n</tool_call>", []),
    "deepseek r1": (R1, "<think>\n", f"Ask.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "Ask.", "", [("weather", PARIS), ("now", "{}")]),
    "deepseek r1, thought not ended": (R1, "<think>\n", "Ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "Ask.", "", [("now", "{}")]),
    "deepseek v3.1": (V31, "</think>", f"Let me.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{TRICKY}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", "Let me.", [("weather", TRICKY), ("now", "{}")]),
    "deepseek v3.1, broken": (V31, "", "<｜tool▁calls▁begin｜>hm<｜tool▁calls▁end｜>", "", "<｜tool▁calls▁begin｜>hm<｜tool▁calls▁end｜>", []),
    "deepseek v3.2": (V32, "<think>", 'Ask.</think>Let me.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>', "Ask.", "Let me.", [("weather", PARIS), ("now", "{}")]),
    "deepseek v4": (V32, "</think>", '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="where" string="false">{"a": 1}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>', "", "", [("weather", '{"where": {"a": 1}}')]),
    "glm": (GLM, "", "\n<think>Ask.</think>\nLet me.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "Ask.", "Let me.", [("weather", PARIS), ("now", "{}")]),
    "glm without newlines": (GLM, "<think>", "Ask.</think><tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key><arg_value>3</arg_value></tool_call>", "Ask.", "", [("weather", PARIS)]),
    "kimi": (KIMI, "", f"<think>Ask.</think>Let me.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|><|tool_calls_section_end|>", "Ask.", "Let me.", [("weather", PARIS), ("now", "{}")]),
    "minimax": (MINIMAX, "<think>\n", 'Ask.\n</think>\n\nLet me.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>', "Ask.", "Let me.", [("weather", PARIS), ("now", "{}")]),
    "gpt-oss": (GPT_OSS, "<|start|>assistant", f"<|channel|>analysis<|message|>Ask <it>.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{PARIS}", "Ask <it>.", "", [("weather", PARIS)]),
    "gpt-oss, final": (GPT_OSS, "<|start|>assistant", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes, <|.", "Hm.", "Yes, <|.", []),
    "gpt-oss, preamble and call in the role": (GPT_OSS, "<|start|>assistant", f"<|channel|>commentary<|message|>Let me.<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{PARIS}<|call|>", "", "Let me.", [("weather", PARIS)]),
    "gpt-oss, header in the prompt": (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "Yes.", "", "Yes.", []),
    "gpt-oss, no header": (GPT_OSS, "<|start|>assistant", "assistants say yes", "", "assistants say yes", []),
    "gpt-oss, nothing": (GPT_OSS, "<|start|>assistant", "", "", "", []),
    "llama": (LLAMA, "", f'{{"name": "weather", "parameters": {PARIS}}}', "", "", [("weather", PARIS)]),
    "llama, tag and two": (LLAMA, "", f'<|python_tag|>{{"name": "weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}', "", "", [("weather", PARIS), ("now", "{}")]),
    "llama, JSON that is no call": (LLAMA, "", '{"name": "Bob", "parameters": {}}', "", '{"name": "Bob", "parameters": {}}', []),
    "llama, text": (LLAMA, "", ' {"a": 1} is JSON', "", ' {"a": 1} is JSON', []),
    "mistral": (MISTRAL, "", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}, "id": "abcdefghi"}}]', "", "", [("weather", PARIS), ("now", "{}")]),
    "mistral, text": (MISTRAL, "", "[TOOL_CALLS] are [1]", "", "[TOOL_CALLS] are [1]", []),
    "mistral with args": (MISTRAL_ARGS, "", f"[THINK]Ask.[/THINK]Let me.[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}", "Ask.", "Let me.", [("weather", PARIS), ("now", "{}")]),
    "mistral with ids": (MISTRAL_ARGS, "", f"[TOOL_CALLS]weather[CALL_ID]Ab3dEf9hI[ARGS]{PARIS}", "", "", [("weather", PARIS)]),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def collect(pieces):
    """(reasoning, content, [(name, arguments)]) and the ids, of pieces in their order."""
    text, calls, ids = {Reasoning: "", Content: ""}, [], []
    for piece in pieces:
        if not isinstance(piece, ToolCall):
            assert piece.text
            text[type(piece)] += piece.text
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
            ids.append(piece.id)
        else:
            assert piece.index == len(calls) - 1 and piece.id == ids[-1]
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return (text[Reasoning], text[Content], calls), ids


def read(tokenizer, prompt, parts, tools=TOOLS, **asked):
    one = reader(tokenizer, prompt, tools, **asked)
    return collect([piece for part in parts for piece in one.add(part)] + one.end())


@every_case
def test_an_answer_is_read(case):
    tokenizer, prompt, text, *expected = case
    assert read(tokenizer, prompt, [text])[0] == tuple(expected)


@every_case
def test_how_the_text_is_cut_changes_nothing(case):
    tokenizer, prompt, text, *expected = case
    assert read(tokenizer, prompt, text)[0] == tuple(expected), "one character at a time"
    for cut in range(1, len(text)):
        assert read(tokenizer, prompt, [text[:cut], text[cut:]])[0] == tuple(expected), f"cut at {cut}: {text[:cut]!r}"


@every_case
def test_without_tools_calls_are_text(case):
    tokenizer, prompt, text, *_ = case
    for tools, choice in ((None, None), (TOOLS, "none")):
        (_, said, found), _ = read(tokenizer, prompt, [text], tools, tool_choice=choice)
        assert not found
        if tokenizer is not GPT_OSS:  # whose answers are nothing but marks
            begin = re.match(r"\s*<think>|\[THINK\]", text) or prompt.strip().endswith("<think>")
            after = re.split(r"</think>\n*|\[/THINK\]", text, maxsplit=1)[-1] if begin else text
            assert said == ("" if begin and after == text else after)


def test_text_comes_as_early_as_it_can():
    """What cannot become a mark is not held back; a call's name is known before its arguments, which come as written."""
    one = reader(HERMES, "", TOOLS)
    assert one.add("Hello wor") == [Content("Hello wor")]
    assert one.add("ld <") == [Content("ld")]
    assert one.add("b") == [Content(" <b")]
    assert one.add('<tool_call>{"name": "weather", "argu') == []
    (begin,) = one.add('ments": {"ci')
    assert (begin.name, begin.arguments) == ("weather", '{"ci')
    assert [piece.arguments for piece in one.add('ty": "x')] == ['ty": "x']


def test_a_long_string_argument_is_streamed_where_arguments_are_no_json():
    one = reader(CODER, "", TOOLS)
    one.add("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert [piece.arguments for piece in one.add('a "long\nline')] == ['a \\"long\\nline']


def test_names_of_calls():
    for tokenizer, text, form in (
        (HERMES, '<tool_call>{"name": "now", "arguments": {}}</tool_call>', r"call_[0-9a-f]{24}"),
        (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {}}]', r"[a-zA-Z0-9]{9}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]now[CALL_ID]Ab3dEf9hI[ARGS]{}", r"Ab3dEf9hI"),
        (KIMI, "<|tool_call_begin|>functions.now:4<|tool_call_argument_begin|>{}<|tool_call_end|>", r"functions\.now:4"),
        (KIMI, "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>", r"functions\.now:0"),
    ):
        (id,) = read(tokenizer, "", [text])[1]
        assert re.fullmatch(form, id), id
    two = '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 2
    assert len(set(read(HERMES, "", [two])[1])) == 2


@pytest.mark.parametrize("name", ["hermes, two after thought", "coder, no arguments, two", "glm", "kimi", "minimax", "llama, tag and two", "mistral"])
def test_one_call_where_only_one_is_allowed(name):
    tokenizer, prompt, text, *_, calls = CASES[name]
    one = reader(tokenizer, prompt, TOOLS, parallel=False)
    (_, _, found), _ = collect([piece for letter in text for piece in one.add(letter)] + one.end())
    assert found == calls[:1] and one.over


SOUP = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "weather", "arguments": {', '"city": ', "}", "{", '"',
    "<function=weather>", "<parameter=city>", "</parameter>", "</function>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜DSML｜function_calls>", '<｜DSML｜invoke name="weather">', '<｜DSML｜parameter name="city" string="true">',
    "</｜DSML｜parameter>", "</｜DSML｜invoke>", "<|tool_call_begin|>", "functions.now:0", "<|tool_call_argument_begin|>",
    "<minimax:tool_call>", '<invoke name="weather">', '<parameter name="city">', "</invoke>", "<|channel|>", "final",
    "<|message|>", "<|start|>", "assistant", "<|end|>", " to=functions.now", "[TOOL_CALLS]", "[ARGS]", "\n", " ", ",", "<",
)  # fmt: skip


@pytest.mark.parametrize("tokenizer", [HERMES, CODER, R1, V31, V32, GLM, KIMI, MINIMAX, GPT_OSS, LLAMA, MISTRAL, MISTRAL_ARGS])
def test_whatever_is_written_no_word_is_lost_and_cuts_change_nothing(tokenizer):
    """A soup of marks and words: each word comes out, whole or one character at a time or cut anywhere."""
    rng = random.Random(formats.of(tokenizer).name)
    own = [mark for mark in SOUP if mark in str(formats.of(tokenizer))] or list(SOUP)
    for _ in range(60):
        words = [f"w{n}" for n in range(rng.randrange(1, 12))]
        text = "".join(word + "".join(rng.choices(rng.choice((own, SOUP)), k=rng.randrange(4))) for word in words)
        prompt = rng.choice(("", "<think>\n"))
        whole, _ = read(tokenizer, prompt, [text])
        assert read(tokenizer, prompt, text)[0] == whole, text
        cuts = sorted(rng.choices(range(len(text) + 1), k=5))
        assert read(tokenizer, prompt, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])[0] == whole, text
        said = whole[0] + whole[1] + "".join(name + json.dumps(arguments) for name, arguments in whole[2])
        assert all(word in said for word in words), (text, whole)


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("7", {"type": "integer"}, "7"),
        ("7", {"type": "string"}, '"7"'),
        ("7.0", {"type": "integer"}, "7"),
        ("7.5", {"type": "integer"}, '"7.5"'),
        ("7.0", {"type": "number"}, "7.0"),
        ("1e999", {"type": "number"}, '"1e999"'),
        ("NaN", {"type": "number"}, '"NaN"'),
        ("false", {"type": "boolean"}, "false"),
        ("False", {"type": ["boolean", "null"]}, "false"),
        ("1", {"type": "boolean"}, '"1"'),
        ("null", {"type": ["string", "null"]}, "null"),
        ("null", {"type": "string"}, '"null"'),
        ("x", {"enum": ["x", "y"]}, '"x"'),
        ("3", {"enum": ["3", "y"]}, '"3"'),
        ("{'a': None}", {"type": "object"}, '{"a": null}'),
        ('{"é": "\\ud800"}', {"type": "object"}, '{"\\u00e9": "\\ud800"}'),
        ("{[1]}", {"type": "object"}, '"{[1]}"'),
        ("{[1]: 2}", {"type": "object"}, '"{[1]: 2}"'),
        ("{1, 2}", {"type": "object"}, '"{1, 2}"'),
        ("__import__('os')", {"type": "object"}, "\"__import__('os')\""),
        ("[1, 2]", {}, "[1, 2]"),
        ("hello", {}, '"hello"'),
        ("1" * 5000, {"type": "integer"}, '"' + "1" * 5000 + '"'),
        ("[" * 100000, {"type": "array"}, '"' + "[" * 100000 + '"'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_casting(text, schema, expected):
    assert arguments.cast(text, arguments.kinds(schema, schema)) == expected


def test_a_schema_that_refers_to_itself():
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}, "c": {"anyOf": [{"$ref": "#/$defs/c"}]}}}
    assert arguments.kinds(schema, schema) == set()
    assert arguments.kinds({"$ref": "#/$defs/c"}, schema) == set()


def test_the_tokens_that_are_marks_are_shown_and_the_others_are_not():
    """The detokenizer shows what the reader needs of the special tokens, and nothing else of them."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.chat_template = HERMES.chat_template
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<|other|>"], special_tokens=True)
    text = '<think>Wär <|other|>es?</think><tool_call>{"name": "now", "arguments": {}}</tool_call>'
    one = reader(tokenizer, "", TOOLS)
    words = Detokenizer(tokenizer, keep=one.keep)
    pieces = [piece for id in tokenizer.encode(text) for piece in one.add(words.add(id))]
    assert collect(pieces + one.add(words.rest()) + one.end())[0] == ("Wär es?", "", [("now", "{}")])
    assert "<tool_call>" not in tokenizer.convert_ids_to_tokens(reader(tokenizer, "", None).keep)
    hidden = Detokenizer(tokenizer)
    assert "".join(map(hidden.add, tokenizer.encode(text))) == 'Wär es?{"name": "now", "arguments": {}}'


TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {},
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|assistant|>", "<think>Hm.</think>Yes.", ("Hm.", "Yes.", [])),
        ("<|assistant|><think>", "Hm.</think>Yes.", ("Hm.", "Yes.", [])),
        ("<|assistant|>", 'a<call>{"name": "weather", "arguments": {"days": "3"}}</call>b<call>{"name": "now", "arguments": {}}</call>',
         ("", "ab", [("weather", '{"days": 3}'), ("now", "{}")])),
        ("<|assistant|>", "a<call>broken</call>b<think>c</think>", ("c", "abrokenb", [])),
        ("<|assistant|>", "a<call>{cut", ("", "a{cut", [])),
        ("", "Hello <", ("", "Hello <", [])),
    ],
)  # fmt: skip
def test_a_template_that_the_tokenizer_ships_goes_first(prompt, text, expected):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.response_template = TEMPLATE
    assert read(tokenizer, prompt, [text])[0] == expected
    assert read(tokenizer, prompt, text)[0] == expected
