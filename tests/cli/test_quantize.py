"""`kt quantize`, and `python -m ktransformers.quantize`, the name that scripts know: flags, output, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.gguf_files import write
from tests.loaders import small_files

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    small_files.model("qwen3_moe").save_pretrained(path)
    return path


def quantize(*arguments):
    return CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)])


def test_json_is_one_object_and_a_person_reads_a_line(folder, tmp_path):
    out = tmp_path / "new" / "m.gguf"
    ran = quantize(folder, out, "--type", "Q8_0", "--split", 10, "--json")
    assert ran.exit_code == 0, ran.output
    done = json.loads(ran.stdout)
    assert [Path(p).name for p in done["files"]] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert done["bytes"] == sum(p.stat().st_size for p in out.parent.iterdir())
    ran = quantize(folder, tmp_path / "one.gguf")
    assert ran.exit_code == 0 and ran.stdout.startswith("wrote ") and (tmp_path / "one.gguf").is_file()


def test_the_types_of_the_help_are_those_of_the_writer():
    assert all(f" {name}" in " ".join(quantize("--help").stdout.split()) for name in write.FILE_TYPES)


def test_an_error_is_one_message_and_exit_code_1(folder, tmp_path):
    ran = quantize(folder, tmp_path / "m.gguf", "--type", "Q4_K_N")
    assert ran.exit_code == 1 and ran.stdout == "" and "did you mean 'Q4_K_M'" in ran.stderr
    ran = quantize(folder / "none", tmp_path / "m.gguf")
    assert ran.exit_code == 1 and ran.stderr.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_and_exit_code_130(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_packed", interrupt)
    ran = quantize(folder, tmp_path / "m.gguf", "--type", "Q8_0")
    assert ran.exit_code == 130 and len(ran.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_the_module_that_scripts_know(folder, tmp_path):
    command = [sys.executable, "-m", "ktransformers.quantize", folder, tmp_path / "m.gguf", "--type", "BF16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.gguf").is_file()
    from ktransformers.quantize import quantize_folder

    assert quantize_folder is write.quantize_folder
