"""`kt sft` at a prompt: a file alone trains, results as a table or JSON, errors with exit code 1."""

import json

import pytest
from typer.testing import CliRunner

from ktransformers import cli

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def kt(*arguments):
    ran = CliRunner().invoke(cli.app, ["sft", *map(str, arguments)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


@pytest.fixture
def file(tmp_path):
    rows = [{"instruction": f"Say {i}", "output": f"{i}!"} for i in range(4)]
    (tmp_path / "say.json").write_text(json.dumps(rows))
    path = tmp_path / "say.yaml"
    path.write_text(
        f"dataset: {tmp_path / 'say.json'}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 2\nlogging_steps: 1\nlora_rank: 2\n"
        "lora_target: experts\n"
    )
    return path


def test_a_file_alone_trains_and_its_adapter_is_used(file):
    ran = kt(file, "learning_rate=1e-3", "--json")
    done = json.loads(ran.stdout)
    assert ran.exit_code == 0 and done["steps"] == 2 and done["trained"] == done["trained_in_experts"] > 0
    assert "step 2 of 2" not in ran.stdout and "holds an adapter" in kt("train", file).stderr
    adapter = f"adapter_name_or_path={done['output_dir']}"
    ran = kt("train", file, adapter, "do_predict=true", "do_sample=false", "max_new_tokens=4", "max_samples=1")
    assert ran.exit_code == 0 and "predict_rouge-l" in ran.stdout


def test_mistakes_end_with_exit_code_1(file):
    file.write_text(file.read_text() + "lora_rnak: 3\n")
    ran = kt(file)
    assert ran.exit_code == 1 and "did you mean 'lora_rank'" in ran.stderr
    assert kt(file.parent / "none.yaml").exit_code == 1 and kt("chat", file.parent / "none.yaml").exit_code == 1
    assert kt("train").exit_code == 2
