"""Flags of published command lines: each works, or gets one line that says what to do."""

import pytest
import typer
from typer.testing import CliRunner

from ktransformers import cli, local_chat
from ktransformers.cli import conversation
from ktransformers.cli.published_flags import FLAGS, translate

CHAT = {"model": "", "weights": "--weights", "rule": "--rule", "threads": "--threads", "devices": "--devices",
        "force_think": "--force-think"}  # fmt: skip


@pytest.fixture
def options(monkeypatch):
    """Call with a program and its arguments: (what it would run with, its notices)."""
    seen = []
    monkeypatch.setattr(conversation, "talk", seen.append)

    def run(program, *arguments):
        app, first = (local_chat.app, ()) if program == "local_chat" else (cli.app, ("chat",))
        ran = CliRunner().invoke(app, [*first, *arguments])
        assert ran.exit_code == 0, ran.output
        return seen.pop(), " ".join(ran.stderr.split())

    return run


@pytest.mark.parametrize("program", ["local_chat", "chat"])
def test_a_published_command_line_runs(options, program):
    """The one of upstream's README, and its spellings for python-fire."""
    line = "--model_path M --gguf_path G.gguf --optimize_rule_path R.yaml --cpu_infer 33 --max_new_tokens 1000"
    more = "--force_think true --use_cuda_graph=False --mode long_context --chunk_size 512 --device cpu --prompt_file p.txt"
    found, notices = options(program, *line.split(), *more.split())
    assert found == conversation.Options(
        model_path="M", weights="G.gguf", rule="R.yaml", threads=33, max_new_tokens=1000, chunk_size=512,
        devices=("cuda=cpu",), prompt_file="p.txt", force_think=True,
    )  # fmt: skip
    assert notices.count("note:") == 3
    for text in ("--use_cuda_graph has no effect", "--mode has no effect", "--device cpu is read as --devices cuda=cpu"):
        assert text in notices


@pytest.mark.parametrize("program", ["local_chat", "chat"])
def test_own_flags_are_left_alone(options, program):
    spelled = {"local_chat": ["--model-path", "M", "--optimize-config-path", "R"], "chat": ["M", "--rule", "R"]}[program]
    found, notices = options(program, *spelled, "--max-new-tokens", "7", "--force-think", "--devices", "cuda=cpu", "--cache", "q8_0")
    assert found == conversation.Options(
        model_path="M", rule="R", max_new_tokens=7, force_think=True, devices=("cuda=cpu",), cache="q8_0"
    )  # fmt: skip
    assert notices == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--force_think", ["--force-think"]),
        ("--force_think=True", ["--force-think"]),
        ("--force_think False x", ["x"]),
        ("--force-think true", ["--force-think"]),
        ("--noforce_think", []),
        ("--use_cuda_graph x", ["x"]),
        ("--nouse_cuda_graph", []),
        ("--no-use-cuda-graph", []),
        ("--device cuda", []),
        ("--device=cuda:1", ["--devices", "cuda=cuda:1"]),
        ("--gguf_path=a=b", ["--weights", "a=b"]),
        ("--model_path M", ["M"]),
        ("-- --mode x", ["--", "--mode", "x"]),
    ],
)
def test_spellings(words, expected):
    assert translate(words.split(), CHAT)[0] == expected


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_works_or_says_what_to_do(name):
    arguments = [f"--{name}"] if FLAGS[name].switch else [f"--{name}", "2"]
    if FLAGS[name].refused:
        with pytest.raises(typer.BadParameter, match="Leave it out|write it there"):
            translate(arguments, CHAT)
        return
    done, notices = translate(arguments, CHAT)
    assert bool(done) == bool(FLAGS[name].becomes)
    assert done or notices and "Leave it out" in notices[0]


def test_a_flag_without_its_value_is_an_error():
    with pytest.raises(typer.BadParameter, match="--mode: expected a value"):
        translate(["--mode"], CHAT)
