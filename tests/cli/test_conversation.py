"""A conversation: its answers, its limits, and that whatever goes wrong in a turn, the next one is right."""

import json

import pytest
import torch
from transformers import GenerationConfig

from ktransformers.cli import conversation
from ktransformers.cli.conversation import Chat, Options
from ktransformers.engine.load import load
from ktransformers.errors import KTransformersError


@pytest.fixture(scope="module")
def loaded():
    """The embedded model from its GGUF, as the program loads it."""
    return load()


@pytest.fixture
def config(loaded, monkeypatch):
    """Call with fields of a generation_config, to have a chat under it."""
    model, _ = loaded

    def make(**fields):
        known = {**model.generation_config.to_dict(), **fields}
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**known))

    return make


def chat(loaded, **options):
    return Chat(*loaded, Options(**{"max_new_tokens": 60, "chunk_size": 64, "greedy": True, "as_json": True} | options))


def test_json_is_one_object_per_answer(loaded, capsys):
    assert chat(loaded).run(["What is a rule file?", "What is an expert?"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["question"] for o in objects] == ["What is a rule file?", "What is an expert?"]
    assert objects[0]["decode_tokens"] > 3 and objects[1]["reused_tokens"] > objects[0]["prefill_tokens"]


def test_streamed_text_is_the_decoded_answer(loaded, capsys):
    one = chat(loaded, as_json=False)
    answer = one.answer("What is a rule file?")
    assert capsys.readouterr().out == answer + "\n"
    assert one.messages[-1] == {"role": "assistant", "content": answer}


def test_text_is_shown_as_the_model_wrote_it(loaded, capsys):
    """Neither markup nor emoji codes are taken for more than their letters."""
    one = chat(loaded, as_json=False)
    one._show("[red]x[/red] :smile: \N{SNOWMAN}")
    assert capsys.readouterr().out == "[red]x[/red] :smile: \N{SNOWMAN}"


def test_chunk_size_does_not_change_an_answer(loaded, capsys):
    question = "How does a rule file say which modules it matches?"
    assert chat(loaded, chunk_size=1).answer(question) == chat(loaded, chunk_size=4096).answer(question)


# ---- lengths -----------------------------------------------------------------------------------------------


def test_old_turns_are_dropped_when_the_context_is_full_and_one_line_says_so(loaded, capsys, monkeypatch):
    one = chat(loaded)
    monkeypatch.setattr(one.model.config, "max_position_embeddings", 100)
    for _ in range(4):
        one.answer("What is a rule file and what does it hold?")
    assert len(one.messages) <= 4
    capsys.readouterr()
    one.messages[:0] = [{"role": role, "content": "word " * 12} for role in ("user", "assistant")] * 2
    one.answer("What is MLA?")
    assert capsys.readouterr().err.count("dropped") == 1
    assert one.run(["word " * 400]) == 1
    assert "Shorten it" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert one.messages[-1]["role"] == "assistant"  # the message that was too long is not part of the conversation


def test_an_answer_ends_where_the_context_does(loaded, capsys, monkeypatch):
    one = chat(loaded, max_new_tokens=500)
    monkeypatch.setattr(one.model.config, "max_position_embeddings", 24)
    one.answer("What is a rule file?")
    result = json.loads(capsys.readouterr().out)
    assert result["prefill_tokens"] + result["decode_tokens"] < 24


@pytest.mark.parametrize(
    ("flag", "fields", "expected"),
    [
        (None, {"max_new_tokens": 3}, 3),
        (5, {"max_new_tokens": 3}, 5),
        (None, {"max_length": 16}, 16 - 10),
        (5, {"max_length": 12}, 5),
        (None, {"max_new_tokens": 4, "max_length": 12}, 4),
    ],
    ids=str,
)
def test_lengths_of_the_generation_config_hold_until_a_flag_says_otherwise(loaded, config, capsys, flag, fields, expected):
    """As in generate: max_new_tokens goes before max_length. The prompt has 10 tokens."""
    config(eos_token_id=None, **fields)
    one = Chat(*loaded, Options(max_new_tokens=flag, greedy=True, as_json=True))
    one.sampling = conversation_without_stops(one.sampling)
    one.answer("What is a rule file?")
    result = json.loads(capsys.readouterr().out)
    assert result["prefill_tokens"] == 10 and 1 + result["decode_tokens"] == expected


def conversation_without_stops(sampling):
    object.__setattr__(sampling, "stop_ids", frozenset())
    return sampling


# ---- generation_config -------------------------------------------------------------------------------------


def test_a_field_that_has_no_effect_is_named_once(loaded, config, capsys):
    config(num_beams=4, num_return_sequences=2)
    one = chat(loaded)
    one.run(["What is MLA?", "What is a rule file?"])
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("note:") == 1 and "num_beams" in err and "num_return_sequences" in err


def test_a_generation_config_of_no_sense_stops_the_program_before_the_first_message(loaded, config):
    config(do_sample=True, top_p=-1.0)
    with pytest.raises(KTransformersError, match=r"top_p.*Correct generation_config\.json"):
        chat(loaded, greedy=False)


def test_thinking_can_be_forced(loaded, capsys):
    """The prompt ends with <think>, and the answer that is kept begins with it, as the model's template expects."""
    one = chat(loaded, force_think=True, as_json=False)
    ids, thought = one._tokens([{"role": "user", "content": "hello"}])
    plain = chat(loaded)._tokens([{"role": "user", "content": "hello"}])[0]
    assert one.tokenizer.decode(ids[len(plain) :]) == thought == "<think>\n" and ids[: len(plain)] == plain
    one.answer("hello")
    assert capsys.readouterr().out.startswith("<think>\n") and one.messages[-1]["content"].startswith("<think>\n")


def test_a_template_that_thinks_by_itself_is_not_forced_twice(loaded, monkeypatch):
    one = chat(loaded, force_think=True)
    monkeypatch.setattr(one.tokenizer, "chat_template", "{{ messages[-1].content }}<think>\n")
    assert one._tokens([{"role": "user", "content": "hello"}])[1] == ""


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(loaded, capsys, monkeypatch):
    one = chat(loaded)
    shown = []

    def interrupted(piece):
        shown.append(piece)
        if len(shown) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one, "_show", interrupted)
        assert one.run(["What is a rule file?"]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["stopped"] and stopped["decode_tokens"] <= 6
    assert chat(loaded).answer("What is MLA?") == _answer_in_new(one)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("boom\nmore"), MemoryError(), KTransformersError("no")], ids=repr)
@pytest.mark.parametrize("passes", [0, 1, 4], ids=["prefill", "decode", "later"])
def test_a_conversation_goes_on_after_any_error(loaded, capsys, monkeypatch, passes, error):
    """In the middle of a forward pass, between two layers: the second turn is what it is without the first."""
    one = chat(loaded)
    layer, count = one.model.model.layers[-1], []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) > passes:
            raise error
        return type(layer).forward(layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", failing)
        code = one.run(["What is a rule file?"])
    result = json.loads(capsys.readouterr().out)
    if error is KeyboardInterrupt:
        assert code == 0 and result["stopped"] and len(one.messages) == 2
    else:
        assert code == 1 and one.messages == [] and result["question"] == "What is a rule file?"
        assert result["error"]["type"] == type(error).__name__
    assert _answer_in_new(one) == chat(loaded).answer("What is MLA?")


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(loaded, capsys, monkeypatch):
    one = chat(loaded, as_json=False)
    monkeypatch.setattr(one, "_prompt", lambda: 1 / 0)
    monkeypatch.delenv("KT_DEBUG", raising=False)
    assert one.run(["hello", "again"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2 and err.count("error: ZeroDivisionError: division by zero.") == 2
    monkeypatch.setenv("KT_DEBUG", "1")
    one.run(["hello"])
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_before_the_prompt_is_read_is_an_answer_of_nothing(loaded, capsys, monkeypatch):
    one = chat(loaded)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one, "_prompt", interrupted)
        assert one.run(["What is a rule file?"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == ""
    assert chat(loaded).answer("What is MLA?") == _answer_in_new(one)


def _answer_in_new(one):
    one.messages.clear()
    return one.answer("What is MLA?")


def test_a_template_that_refuses_is_one_error(loaded, capsys, monkeypatch):
    one = chat(loaded, as_json=False)
    monkeypatch.setattr(one.tokenizer, "chat_template", "{{ raise_exception('system first') }}")
    assert one.run(["hello"]) == 1
    assert "system first" in capsys.readouterr().err and one.messages == []


# ---- commands ----------------------------------------------------------------------------------------------


def test_commands_are_not_answered_by_the_model(loaded, capsys):
    one = chat(loaded, as_json=False)
    one.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert one.run(["/help", "/?"]) == 0
    assert capsys.readouterr().err.count("/new") == 2 and len(one.messages) == 2
    assert one.run(["/nwe"]) == 1
    assert "did you mean '/new'?" in capsys.readouterr().err and len(one.messages) == 2
    assert one.run(["/new"]) == 0 and one.messages == []
    assert capsys.readouterr().out == ""


def test_an_unknown_command_is_an_error_object(loaded, capsys):
    assert chat(loaded).run(["/foo"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["question"] == "/foo" and "no such command" in result["error"]["message"]


# ---- threads -----------------------------------------------------------------------------------------------


def test_more_threads_than_cores_are_as_many_as_cores(monkeypatch, capsys):
    from ktransformers import native

    monkeypatch.setattr(native, "default_threads", lambda: 2)
    given = []
    monkeypatch.setattr(native, "set_threads", given.append)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    conversation._set_threads(33)
    assert given == [2, 2] and "33 CPU threads: this process may use 2 cores" in capsys.readouterr().err
    conversation._set_threads(0)
    assert given == [2, 2]
    with pytest.raises(KTransformersError, match="expected 1 to 2, or 0"):
        conversation._set_threads(-3)
