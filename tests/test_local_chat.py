"""The chat program under upstream's flags, in a process of its own: pipes, bad input, Ctrl-C, a full disk."""

import json
import os
import re
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


def test_each_line_of_a_pipe_is_answered():
    ran = run("--max_new_tokens", "40", "--cpu_infer", "1", stdin="What is a rule file?\n\nWhat is MLA?\n")
    assert ran.returncode == 0, ran.stderr
    answers = ran.stdout.strip().splitlines()
    assert len(answers) == 2 and "YAML" in answers[0]
    assert ran.stderr.count("tokens/s") == 4 and "Traceback" not in ran.stderr


def test_the_file_itself_runs_as_upstreams_did():
    """`python ktransformers/local_chat.py`: its folder is the first of sys.path then."""
    ran = subprocess.run(
        [sys.executable, "ktransformers/local_chat.py", "--help"], capture_output=True, text=True, timeout=60,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0 and "--gguf_path" in ran.stdout, ran.stderr


def test_arguments_need_no_torch():
    code = "import sys, ktransformers.local_chat, ktransformers.cli.conversation; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.stdout.strip() == "False", ran.stderr


def test_something_is_shown_before_torch_is_imported():
    """So that a person sees within half a second that the program is at work."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise SystemExit(7)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from ktransformers.local_chat import app\n"
        "app(['--gguf_path', 'x.gguf'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 7 and ran.stderr == "loading x.gguf\n" and ran.stdout == ""


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
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_below_standard_output_is_one_error(flags):
    ran = subprocess.run(
        ["bash", "-c", '"$@" > /dev/full', "bash", *command("--max_new_tokens", "5", *flags)],
        input="What is MLA?\n", capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1 and "cannot be written" in ran.stderr and "Traceback" not in ran.stderr


def test_a_prompt_file_is_answered_once(tmp_path):
    """A message that looks like a command is a message there."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("/new What is a rule file?")
    ran = run("--prompt_file", str(prompt), "--json", "--max_new_tokens", "30", stdin="not read\n")
    assert ran.returncode == 0 and ran.stderr == "" and len(ran.stdout.splitlines()) == 1
    assert json.loads(ran.stdout)["question"] == "/new What is a rule file?"


BAD = [
    (["--cpu_infer", "0x"], "cpu_infer"),
    (["--cpu_infer", "-3"], "expected 1 to"),
    (["--model_path", "/no/such/folder"], "no such folder"),
    (["--gguf_path", "/no/such/file.gguf"], "no such file"),
    (["--optimize_config_path", "DeepSek-V3"], "did you mean 'DeepSeek-V3'"),
    (["--prompt_file", "/no/such/prompt"], "cannot be read"),
    (["--devices", "cuda"], "expected NAME=NAME"),
    (["--max_new_tokens", "0"], "max_new_tokens"),
    (["--port", "10002"], "belongs to a server"),
    (["--no_such_flag"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_error_and_an_exit_code(arguments, message):
    result = CliRunner().invoke(local_chat.app, arguments, input="")
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_an_error_before_the_first_message_is_a_json_object_too():
    ran = CliRunner().invoke(local_chat.app, ["--json", "--model_path", "/no/such/folder"], input="")
    error = json.loads(ran.stdout)["error"]
    assert ran.exit_code == 1 and "no such folder" in error["message"] and error["type"] == "KTransformersError"


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_truncated_file_is_one_error(size, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(next(embedded_model().glob("*.gguf")).read_bytes()[:size])
    ran = CliRunner().invoke(local_chat.app, ["--gguf_path", str(path)], input="hello\n")
    assert ran.exit_code == 1 and "error:" in ran.stderr and str(path) in ran.stderr
    assert isinstance(ran.exception, SystemExit)


def test_the_program_dies_politely_when_interrupted_while_loading():
    process = subprocess.Popen(
        command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    # Python itself reports, and goes on after, one that comes while a library's __del__ runs.
    errors = re.sub(r"Exception ignored in.*?\nKeyboardInterrupt: ?\n", "", errors, flags=re.DOTALL)
    assert "Traceback" not in errors
    # -2: Python ends itself by SIGINT when the interrupt passed through C code that runs Python; a shell says 130 too.
    assert process.returncode in (0, 1, 130, -signal.SIGINT)


def test_the_embedded_folder_holds_both_forms():
    assert embedded_model().joinpath("model.safetensors").is_file() and list(embedded_model().glob("*.gguf"))
