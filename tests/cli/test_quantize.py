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
    out.parent.mkdir()
    ran = quantize(folder, out, "--type", "Q8_0", "--split", 10, "--json")
    assert ran.exit_code == 0, ran.output
    done = json.loads(ran.stdout)
    assert [Path(p).name for p in done["files"]] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert done["bytes"] == sum(p.stat().st_size for p in out.parent.iterdir())
    ran = quantize(folder, tmp_path / "one.gguf")
    assert ran.exit_code == 0 and ran.stdout.startswith("wrote ") and (tmp_path / "one.gguf").is_file()


def test_the_types_of_the_help_are_those_of_the_writer():
    *names, last = write.FILE_TYPES
    text = f"{', '.join(names)} or {last}."
    assert text in " ".join(quantize("--help").stdout.replace("│", " ").split())


def test_an_error_is_one_message_and_exit_code_1(folder, tmp_path):
    ran = quantize(folder, tmp_path / "m.gguf", "--type", "Q4_K_N")
    assert ran.exit_code == 1 and ran.stdout == "" and "did you mean 'Q4_K_M'" in ran.stderr
    ran = quantize(folder / "none", tmp_path / "m.gguf")
    assert ran.exit_code == 1 and ran.stderr.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_a_source_that_is_none_is_told_from_a_folder_without_a_config(tmp_path):
    (tmp_path / "x.gguf").touch()
    (tmp_path / "x.bin").touch()
    (tmp_path / "empty").mkdir()
    expected = {"none": "no such folder", "x.gguf": "is a GGUF file already", "x.bin": "is a file", "empty": "no config.json in it"}
    for name, message in expected.items():
        ran = quantize(tmp_path / name, tmp_path / "out.gguf")
        assert ran.exit_code == 1 and f"{tmp_path / name}: {message}" in ran.stderr


def test_wrong_arguments_are_said_before_that_out_exists_and_all_at_once(folder, tmp_path):
    out = tmp_path / "m.gguf"
    out.touch()
    ran = quantize(folder, out, "--split", "-1")
    assert ran.exit_code == 1 and "--split -1: expected 0" in ran.stderr and "exists" not in ran.stderr
    ran = quantize(tmp_path / "none", tmp_path / "m.bin", "--type", "Q4", "--split", "-1")
    assert ran.exit_code == 1 and all(text in ran.stderr for text in ("Unknown --type 'Q4'", "--split -1", "no such folder", "NAME.gguf"))
    assert "OUT" in quantize(folder, out).stderr and "exists already" in quantize(folder, out).stderr


def test_a_folder_that_does_not_exist_is_not_made(folder, tmp_path):
    """As kt plan -o says it."""
    out = tmp_path / "new" / "m.gguf"
    ran = quantize(folder, out)
    assert ran.exit_code == 1 and list(tmp_path.iterdir()) == []
    assert f"OUT {out}: is a folder, or its folder does not exist; expected a file's path." in ran.stderr


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
