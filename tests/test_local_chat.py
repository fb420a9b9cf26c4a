"""The chat program answers from a pipe, keeps a conversation, and turns bad input into one line and an exit code."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ktransformers.models import embedded_model
from typer.testing import CliRunner

from ktransformers import local_chat

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments):
    return [sys.executable, "-m", "ktransformers.local_chat", *arguments]


def run(*arguments, stdin="", **environment):
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    """The embedded model from its GGUF, as the program loads it."""
    return local_chat.load("", "", "", {}, quiet=True)


def chat(loaded, **options):
    options = {"max_new_tokens": 60, "chunk_size": 64, "greedy": True, "as_json": True} | options
    return local_chat.Chat(*loaded, **options)


def test_each_line_of_a_pipe_is_answered():
    ran = run("--max_new_tokens", "40", "--cpu_infer", "1", stdin="What is a rule file?\n\nWhat is MLA?\n")
    assert ran.returncode == 0, ran.stderr
    answers = ran.stdout.strip().splitlines()
    assert len(answers) == 2 and "YAML" in answers[0]
    assert ran.stderr.count("tokens/s") == 4 and "Traceback" not in ran.stderr


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


def test_chunk_size_does_not_change_an_answer(loaded, capsys):
    question = "How does a rule file say which modules it matches?"
    assert chat(loaded, chunk_size=1).answer(question) == chat(loaded, chunk_size=4096).answer(question)


def test_words_hold_back_unfinished_characters(loaded):
    tokenizer = loaded[1]
    words = local_chat._Words(tokenizer)
    text = "Fenêtre → 中文 🙂 end"
    pieces = [words.add(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) + words.rest() == words.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_old_turns_are_dropped_when_the_context_is_full(loaded, capsys, monkeypatch):
    one = chat(loaded)
    monkeypatch.setattr(one.model.config, "max_position_embeddings", 100)
    for _ in range(4):
        one.answer("What is a rule file and what does it hold?")
    assert len(one.messages) <= 4
    assert one.run(["word " * 400]) == 1
    assert "Shorten it" in capsys.readouterr().err
    assert one.messages[-1]["role"] == "assistant"  # the message that was too long is not part of the conversation


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


def _answer_in_new(one):
    one.messages.clear()
    return one.answer("What is MLA?")


def test_a_fence_takes_several_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""first\nsecond"""\nthird\nexit\nnever\n'))
    assert list(local_chat._messages(quiet=True)) == ["first\nsecond", "third"]


def test_a_fence_that_is_never_closed_still_makes_a_message(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""first\nsecond'))
    assert list(local_chat._messages(quiet=True)) == ["first\nsecond"]


def test_stray_bytes_and_a_closed_input_are_no_disaster():
    ran = subprocess.run(
        command("--max_new_tokens", "5"), input=b"caf\xe9 ?\nWhat is MLA?\n", capture_output=True, cwd=ROOT, timeout=300
    )
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 2
    ran = subprocess.run(
        ["bash", "-c", '"$@" <&-', "bash", *command()], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_below_standard_output_is_one_error():
    ran = subprocess.run(
        ["bash", "-c", '"$@" > /dev/full', "bash", *command("--max_new_tokens", "5")],
        input="What is MLA?\n", capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1 and "cannot be written" in ran.stderr and "Traceback" not in ran.stderr


def test_an_answer_ends_where_the_context_does(loaded, capsys, monkeypatch):
    one = chat(loaded, max_new_tokens=500)
    monkeypatch.setattr(one.model.config, "max_position_embeddings", 24)
    one.answer("What is a rule file?")
    result = json.loads(capsys.readouterr().out)
    assert result["prefill_tokens"] + result["decode_tokens"] < 24


def test_a_template_that_refuses_is_one_error(loaded, capsys, monkeypatch):
    one = chat(loaded)
    monkeypatch.setattr(one.tokenizer, "chat_template", "{{ raise_exception('system first') }}")
    assert one.run(["hello"]) == 1
    assert "system first" in capsys.readouterr().err and one.messages == []


def test_a_prompt_file_is_answered_once(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is a rule file?")
    ran = run("--prompt_file", str(prompt), "--json", "--max_new_tokens", "30", stdin="not read\n")
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 1
    assert json.loads(ran.stdout)["question"] == "What is a rule file?"


BAD = [
    (["--cpu_infer", "0x"], "cpu_infer"),
    (["--cpu_infer", "-3"], "expected 1 to"),
    (["--cpu_infer", "100000"], "the cores this process may use"),
    (["--model_path", "/no/such/folder"], "no such folder"),
    (["--gguf_path", "/no/such/file.gguf"], "no such file"),
    (["--optimize_config_path", "DeepSek-V3"], "did you mean 'DeepSeek-V3'"),
    (["--prompt_file", "/no/such/prompt"], "cannot be read"),
    (["--devices", "cuda"], "expected NAME=NAME"),
    (["--max_new_tokens", "0"], "max_new_tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_error_and_an_exit_code(arguments, message):
    import typer

    app = typer.Typer()
    app.command()(local_chat.main)
    result = CliRunner().invoke(app, arguments, input="")
    assert result.exit_code != 0
    assert message in result.output.replace("\n", " ") or message in result.stderr.replace("\n", " ")
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_model_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(local_chat.KTransformersError, match=r"has no config\.json"):
        local_chat._read_config(str(tmp_path))


def test_the_program_dies_politely_when_interrupted_while_loading():
    process = subprocess.Popen(
        command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    # -2: Python ends itself by SIGINT when the interrupt passed through C code that runs Python; a shell says 130 too.
    assert process.returncode in (0, 1, 130, -signal.SIGINT)


def test_the_embedded_folder_holds_both_forms():
    assert embedded_model().joinpath("model.safetensors").is_file() and list(embedded_model().glob("*.gguf"))
