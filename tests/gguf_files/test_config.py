"""A config that comes back from a GGUF file, and a chat with nothing but that file. Families: loaders/test_gguf_families.py."""

import json
import shutil

import pytest
from ktransformers.models import embedded_model
from transformers import AutoConfig

from ktransformers import config_from_gguf, local_chat
from ktransformers.engine.load import read_config_and_tokenizer
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from tests.loaders.small_files import edit_gguf

GGUF = next(embedded_model().glob("*.gguf"))


def test_the_embedded_file_says_what_its_folder_says():
    found, expected = config_from_gguf(GGUF).to_dict(), AutoConfig.from_pretrained(embedded_model()).to_dict()
    assert found | {"_name_or_path": ""} == expected | {"_name_or_path": ""}


def test_split_files_are_one_model(tmp_path):
    from ktransformers.gguf_files.write import quantize_folder

    paths = quantize_folder(embedded_model(), tmp_path / "m.gguf", "Q8_0", split=20)["files"]
    assert config_from_gguf(paths[0]).to_dict() == config_from_gguf(GGUF).to_dict()


@pytest.mark.parametrize("flag", ["--gguf_path", "--model_path"])
def test_a_chat_with_a_lone_file(flag, tmp_path, capfd):
    """The answer is that of the folder and its GGUF; the file stands in a folder of its own."""
    from typer.testing import CliRunner

    lone = tmp_path / "lone.gguf"
    shutil.copy(GGUF, lone)
    answers = []
    for arguments in ([flag, str(lone)], ["--model_path", str(embedded_model()), "--gguf_path", str(GGUF)]):
        options = ["--greedy", "--json", "--max_new_tokens", "20"]
        result = CliRunner().invoke(local_chat.app, [*arguments, *options], input="What is a rule file?\n")
        assert result.exit_code == 0, result.output
        answers.append(json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))["answer"])
    assert answers[0] == answers[1] and "YAML" in answers[0]


def edited(tmp_path, arch=None, **metadata):
    return edit_gguf(GGUF, tmp_path / "x.gguf", metadata=metadata, arch=arch)


def test_a_file_without_a_template_is_one_error(tmp_path):
    path = edit_gguf(GGUF, tmp_path / "x.gguf", metadata={"tokenizer.chat_template": ""})
    with pytest.raises(KTransformersError, match="no chat template.*give a folder with chat_template.jinja as the model"):
        read_config_and_tokenizer(str(path))


def test_what_cannot_be_told_is_one_error(tmp_path):
    with pytest.raises(WeightError, match="not a GGUF file"):
        config_from_gguf(embedded_model() / "model.safetensors")
    with pytest.raises(UnsupportedError, match="'bert' cannot be told.*--model_path"):
        config_from_gguf(edited(tmp_path, arch="bert"))
    with pytest.raises(UnsupportedError, match="'bert' cannot be told.*--model_path"):
        read_config_and_tokenizer(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("count", [0, 2**31])
def test_a_hostile_count_of_layers(count, tmp_path):
    with pytest.raises(WeightError, match=f"block_count is {count}, the tensors are of 3 layers"):
        config_from_gguf(edited(tmp_path, block_count=count))
