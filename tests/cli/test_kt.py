"""The `kt` program: help that reads, JSON that parses, one line for an error, no colour in a pipe, quick to start."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from ktransformers.models import known
from typer.testing import CliRunner

from ktransformers import __version__, cli, env
from ktransformers.cli import common
from ktransformers.errors import KTransformersError, NativeError
from ktransformers.machine.gpus import GPU_MODELS
from ktransformers.planner import formats
from ktransformers.rules.files import packaged_rules

ROOT = Path(__file__).resolve().parent.parent.parent
BARE = {k: v for k, v in os.environ.items() if not k.startswith("KT_") and k not in ("FORCE_COLOR", "PY_COLORS")}


def kt(*arguments, stdin="", **environment):
    """The program in a process of its own, as a shell runs it."""
    return subprocess.run(
        [sys.executable, "-m", "ktransformers.cli", *arguments],
        input=stdin, capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**BARE, "TERM": "xterm-256color", **environment},
    )  # fmt: skip


def invoke(*arguments, app=cli.app):
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("KT_"):
            monkeypatch.delenv(name)


def single():
    """Names of the commands that have none below them."""
    return [function.__name__.rstrip("_") for _, function in cli.COMMANDS]


def commands():
    return [*single(), *(name for _, name, _ in cli.GROUPS)]


# ---- start and help ----------------------------------------------------------------------------------------


def test_help_is_quick_plain_and_names_every_command_under_its_heading():
    start = time.perf_counter()
    ran = kt("--help")
    took = time.perf_counter() - start
    assert ran.returncode == 0 and ran.stderr == ""
    headings = dict.fromkeys([heading for heading, *_ in [*cli.COMMANDS, *cli.GROUPS]])
    at = [ran.stdout.index(f"─ {heading} ─") for heading in headings]
    assert at == sorted(at)
    for name in commands():
        assert f"│ {name} " in ran.stdout
    assert "\x1b" not in ran.stdout
    assert took < 3, f"{took:.2f} s: 0.3 s on an idle machine; does a command module import torch?"


def test_starting_imports_nothing_heavy():
    code = (
        "import sys, ktransformers.cli\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize("name", commands())
def test_each_command_says_what_it_does_and_takes_json(name):
    ran = invoke(name, "--help")
    assert ran.exit_code == 0 and len(ran.output.splitlines()) > 5
    if name in single():
        assert "--json" in ran.output


def test_no_command_shows_help_and_a_wrong_one_says_which_was_meant():
    assert "Usage: kt" in invoke().output
    ran = invoke("docter")
    assert ran.exit_code == 2 and "doctor" in ran.stderr


def test_the_package_runs_as_a_module_too():
    ran = subprocess.run(
        [sys.executable, "-m", "ktransformers", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ran.stdout.strip() == f"ktransformers {__version__}"


def test_names_are_completed():
    words = {"_KT_COMPLETE": "complete_bash", "COMP_WORDS": "kt chat --rule Deep", "COMP_CWORD": "3"}
    ran = kt(**words)
    assert {"DeepSeek-V2", "DeepSeek-V3"} <= set(ran.stdout.split()), ran
    assert "MoE" in common.complete_rule("Mo") and common.complete_rule("no-such") == []
    assert common.complete_gpu("a100") == ["a100-40g", "a100-80g"]


# ---- errors and Ctrl-C -------------------------------------------------------------------------------------


def app_of(command):
    """A program with one command, which is called `run`."""
    app = typer.Typer(cls=common.Program)
    app.callback()(lambda: None)
    app.command("run")(command)
    return app


def test_an_error_is_one_message_and_exit_code_1():
    def broken(size: str = "24"):
        """Docs stay."""
        raise NativeError(f"[{size}] is [red]wrong[/red]. Say 24GiB.")

    ran = invoke("run", "--size", "3", app=app_of(broken))
    assert ran.exit_code == 1 and ran.stdout == ""
    assert ran.stderr == "error: [3] is [red]wrong[/red]. Say 24GiB.\n"
    assert "Docs stay." in invoke("run", "--help", app=app_of(broken)).output


def test_a_long_error_is_not_wrapped_in_a_pipe():
    def broken():
        raise KTransformersError("word " * 60)

    assert len(invoke("run", app=app_of(broken)).stderr.splitlines()) == 1


def test_ctrl_c_is_exit_code_130():
    def interrupted():
        raise KeyboardInterrupt

    ran = invoke("run", app=app_of(interrupted))
    assert ran.exit_code == 130 and ran.stderr == "interrupted\n"


MISTAKES = [
    ("chat", "/no/such/folder"), ("chat", "--max-new-tokens", "0"),
    ("plan", "deepsek-v3"), ("plan", "deepseek-v3", "--gpu", "rtx9999"), ("plan",), ("plan", "deepseek-v3", "--context", "0"),
    ("simulate", "DeepSek", "deepseek-v3"), ("simulate", "MoE", "deepseek-v3", "--gpus", "x"),
    ("profile", "embedded", "--prompts", "/no/such/file"), ("profile", "embedded"),
    ("serve", "/no/such/folder"), ("run", "--port", "70000"), ("serve", "--api-key-file", "/no/such/file"),
    ("serve", "--cache-ram", "many"), ("serve", "--devices", "cuda"), ("serve", "--host", "no such host."),
    ("bench", "/no/such/folder"), ("bench", "--depth", "5000"), ("bench", "--new-tokens", "0"),
    ("cache", "--type", "q4"), ("plan", "qwen3-30b-a3b", "--cache", "q4"), ("chat", "--cache", "q4"),
    ("cache", "--text", "/no/such/file"), ("cache", "--tokens", "5000"),
    ("rules", "check", "DeepSek", "deepseek-v3"), ("rules", "explain", "MoE", "deepsek-v3"), ("rules", "extend", "MoE"),
    ("rules", "chekc"), ("doctor", "--qick"), ("version", "now"), ("config", "--set", "KT_PIN=0"), ("list", "modls"), ("lst",),
]  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_with_json_every_error_is_an_object_too(arguments):
    ran = invoke(*arguments, "--json")
    assert ran.exit_code in (1, 2), ran.output
    assert len(ran.stdout.splitlines()) == 1, ran.stdout
    found = json.loads(ran.stdout)
    assert list(found) == ["error"] and list(found["error"]) == ["message", "type"]
    assert found["error"]["type"].endswith("Error") or ran.exit_code == 2
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ran.stderr).split())
    assert found["error"]["message"][:40].split()[0] in words
    without = invoke(*arguments)
    assert without.stdout == "" and without.exit_code == ran.exit_code


def test_with_json_ctrl_c_and_a_defect_are_objects_too():
    def interrupted(as_json: common.JsonOption = False):
        raise KeyboardInterrupt

    ran = invoke("run", "--json", app=app_of(interrupted))
    assert ran.exit_code == 130 and ran.stderr == "interrupted\n"
    assert json.loads(ran.stdout) == {"error": {"message": "interrupted", "type": "KeyboardInterrupt"}}

    def defect(as_json: common.JsonOption = False):
        raise ZeroDivisionError("division by zero")

    ran = invoke("run", "--json", app=app_of(defect))
    assert isinstance(ran.exception, ZeroDivisionError)  # for the traceback
    assert json.loads(ran.stdout) == {"error": {"message": "division by zero", "type": "ZeroDivisionError"}}


def test_commands_of_a_dataclass_have_its_fields_as_flags():
    @dataclass
    class Options:
        name: Annotated[str, typer.Argument()]
        size: Annotated[list[int], typer.Option("--size")] = field(default_factory=list)

    seen = []

    @common.taking(Options)
    def run(options: Options) -> None:
        """Docs stay."""
        seen.append(options)

    app = app_of(run)
    assert invoke("run", "x", "--size", "1", "--size", "2", app=app).exit_code == 0
    assert invoke("run", "y", app=app).exit_code == 0
    assert seen == [Options("x", [1, 2]), Options("y", [])]
    assert "Docs stay." in invoke("run", "--help", app=app).output and invoke("run", app=app).exit_code == 2


# ---- files that are written --------------------------------------------------------------------------------


def test_a_file_is_not_overwritten_without_force(tmp_path):
    path = tmp_path / "rule.yaml"
    assert common.new_file("", "-o", False) is None and common.new_file(str(path), "-o", False) == path
    path.write_text("mine")
    with pytest.raises(KTransformersError, match=r"-o \S+rule\.yaml: exists already.*--force"):
        common.new_file(str(path), "-o", False)
    common.write_file(common.new_file(str(path), "-o", True), "new", "-o")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["rule.yaml"]
    for bad in (tmp_path, tmp_path / "none" / "x", "a\0b", "~nobody-has-this-name/x", "x" * 5000):
        with pytest.raises(KTransformersError, match="^--plot "):
            common.new_file(str(bad), "--plot", True)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "rule.yaml"
    path.write_text("mine")

    def full(self, *_, **__):
        with open(self, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KTransformersError, match="-o .*cannot be written: No space left"):
        common.write_file(path, "new", "-o")
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["rule.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "qwen3-30b-a3b", "--ram", "64GiB", "-o"),
        ("plan", "qwen3-30b-a3b", "--ram", "64GiB", "--plot"),
        ("profile", "embedded", "--prompts", "PROMPTS", "-o"),
        ("rules", "extend", "MoE", "qwen3-30b-a3b", "-o"),
        ("quantize", "models/embedded"),
    ],
    ids=" ".join,
)
def test_no_command_overwrites_silently(arguments, tmp_path):
    path = tmp_path / ("mine.gguf" if "quantize" in arguments else "mine")
    path.write_text("a prompt, and worth keeping")
    ran = invoke(*(str(path) if word == "PROMPTS" else word for word in arguments), str(path))
    assert ran.exit_code == 1 and "exists already" in ran.stderr and "--force" in ran.stderr
    assert path.read_text() == "a prompt, and worth keeping"


def test_ctrl_c_ends_a_real_command():
    """doctor waits in a kernel run that never ends, until a signal comes."""
    code = (
        "import time\nfrom ktransformers import cli\nfrom ktransformers.cli import doctor\n"
        "def forever(quick, say):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "doctor.examine = forever\ncli.app(['doctor'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_below_standard_output_is_one_error():
    ran = subprocess.run(
        ["bash", "-c", '"$@" > /dev/full', "bash", sys.executable, "-m", "ktransformers", "version", "--json"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1 and "cannot be written" in ran.stderr and "Traceback" not in ran.stderr


def test_a_reader_that_leaves_is_no_error():
    ran = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", sys.executable, "-m", "ktransformers", "config"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ran.stderr == ""


# ---- show --------------------------------------------------------------------------------------------------


def test_json_has_only_what_json_has():
    found = common.plain({1: (1.5, float("nan"), float("inf")), "path": Path("a"), "none": None, "setting": SETTING})
    assert found["1"] == [1.5, None, None] and found["path"] == "a" and found["setting"]["name"] == "KT_X"


SETTING = cli.config.Setting("KT_X", "", "default", "meaning")


def test_show_prints_json_or_tables_and_not_both(capsys):
    common.show({"a": 1}, True, lambda: pytest.fail("tables are not made for JSON"))
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    common.show({"a": 1}, False, lambda: ["one", "two"])
    assert capsys.readouterr().out == "one\ntwo\n"


# ---- version and config ------------------------------------------------------------------------------------


def test_version_says_what_is_installed():
    found = json.loads(invoke("version", "--json").output)
    assert found["ktransformers"] == __version__ and found["torch"] and Path(found["path"]).is_dir()
    assert __version__ in invoke("version").output


def test_config_lists_every_variable_with_its_source(monkeypatch):
    monkeypatch.setenv("KT_THREADS", "2")
    ran = invoke("config", "--json")
    found = {s["name"]: s for s in json.loads(ran.output)["settings"]}
    assert ran.exit_code == 0 and list(found) == list(env.VARIABLES)
    assert (found["KT_THREADS"]["value"], found["KT_THREADS"]["source"]) == ("2", "environment")
    assert (found["KT_PIN"]["value"], found["KT_PIN"]["source"]) == ("1", "default")
    table = invoke("config").output
    assert all(name in table for name in env.VARIABLES) and max(map(len, table.splitlines())) <= 100


BAD_VALUES = [
    ("KT_ISA", "avx", "did you mean 'avx2'?"),
    ("KT_THREADS", "many", "from 1 to 1024"),
    ("KT_DEBUG", "yes", "from 0 to 1"),
    ("KT_PIN", "2", "from 0 to 1"),
    ("KT_HUGE_PAGES", "on", "from 0 to 1"),
    ("KT_NUMA", "all", "lists of CPUs"),
    ("KT_BUILD", "fast", "expected host, all or sources"),
    ("KT_RULE_MODULES", "yaml,no_such_mod.sub", "'no_such_mod.sub' cannot be imported (looked in"),
    ("KT_RULE_MODULES", ".", "'.' cannot be imported"),
    ("KT_THREAD", "3", "did you mean 'KT_THREADS'?"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_config_says_what_is_wrong_with_a_value_and_shows_the_others(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    ran = invoke("config", "--json")
    found = {s["name"]: s for s in json.loads(ran.output)["settings"]}
    assert ran.exit_code == 1 and message in found[name]["problem"] and found[name]["value"] == value
    assert [s["name"] for s in found.values() if s["problem"]] == [name]
    assert message in " ".join(invoke("config").output.replace("│", " ").split())


# ---- chat --------------------------------------------------------------------------------------------------


def test_chat_answers_a_prompt_with_the_embedded_model(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is a rule file?")
    flags = ("--greedy", "--max-new-tokens", "40", "--devices", "cuda=cpu", "--prompt-file", str(prompt), "--json")
    ran = kt("chat", *flags)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert "YAML" in found["answer"] and found["question"] == "What is a rule file?"


BAD_CHATS = [
    (["/no/such/folder"], 1, "no such folder"),
    (["--weights", "/no/such/file.gguf"], 1, "no such file"),
    (["--rule", "DeepSek-V3"], 1, "did you mean 'DeepSeek-V3'"),
    (["--prompt-file", "/no/such/prompt"], 1, "prompt file /no/such/prompt: cannot be read: No such file or directory. Check"),
    (["--threads", "-1"], 2, "threads"),
    (["--max-new-tokens", "0"], 2, "max-new-tokens"),
    (["--devices", "cuda"], 1, "expected NAME=NAME"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_chat_names_its_own_flags_in_errors(arguments, code, message):
    ran = invoke("chat", *arguments)
    text = " ".join(ran.stderr.split())
    assert ran.exit_code == code and message in text
    assert "--cpu_infer" not in text and "--model_path" not in text and "--prompt_file" not in text


# ---- list --------------------------------------------------------------------------------------------------


def listed(*arguments):
    ran = invoke("list", *arguments, "--json")
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def test_list_names_what_the_other_commands_take():
    found = listed()
    assert list(found) == ["models", "gpus", "formats", "rules"]
    assert [row["name"] for row in found["models"]] == known.known_names()
    assert [row["name"] for row in found["gpus"]] == list(GPU_MODELS)
    assert [row["name"] for row in found["formats"]] == formats.format_names()
    assert sorted(row["name"] for row in found["rules"]) == packaged_rules()
    assert all(listed(kind) == {kind: rows} for kind, rows in found.items())


def test_list_says_what_each_is():
    found = {kind: {row["name"]: row for row in rows} for kind, rows in listed().items()}
    v3 = found["models"]["deepseek-v3"]
    assert v3["parameters"] == 671e9 and v3["stored"] == "fp8" and v3["context"] == 163840
    assert found["gpus"]["4090"]["memory"] == 24 << 30
    assert found["formats"]["Q4_K"]["bits"] == 4.5 and found["formats"]["Q4_K_M"]["bits"] is None
    assert found["formats"]["INT4"] == {"name": "INT4", "files": "safetensors", "bits": 4.5}
    assert found["formats"]["MXFP4"]["files"] == "GGUF, safetensors"
    assert found["rules"]["Qwen3-MoE"] == {"name": "Qwen3-MoE", "file": "MoE.yaml", "model_types": ["qwen3_moe"]}


@pytest.mark.parametrize("kind", ["models", "gpus", "formats", "rules"])
def test_list_has_a_table_of_each_kind(kind):
    ran = invoke("list", kind)
    assert ran.exit_code == 0 and max(map(len, ran.stdout.splitlines())) <= 100
    for row in listed(kind)[kind]:
        assert f"│ {row['name']} " in ran.stdout, row["name"]
