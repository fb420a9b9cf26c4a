"""From a path to a model and tokenizer: without a word on the terminal, what a person should know goes to `notify`."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from ktransformers.models import embedded_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktransformers.configs import read_config
from ktransformers.engine import load as loading
from ktransformers.engine.detokenize import Detokenizer
from ktransformers.engine.load import load, read_config_and_tokenizer
from ktransformers.errors import KTransformersError


def test_nothing_is_printed_and_the_steps_are_told(capfd):
    steps = []
    model, tokenizer = load(on_step=steps.append)
    assert capfd.readouterr() == ("", "")
    assert model.config.model_type == "deepseek_v3" and tokenizer.chat_template
    assert steps[0].startswith("importing") and steps[-1].startswith("loading") and "DeepSeek-V3" in steps[-1]


def test_a_notice_comes_once(monkeypatch):
    """However often the rules, and each layer that they place, say it."""
    from ktransformers import optimize

    def optimize_and_load(model, *_, **__):
        for _ in range(3):
            warnings.warn("KLinearMarlin runs on GPUs only", stacklevel=1)
            warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
        return model

    monkeypatch.setattr(optimize, "optimize_and_load", optimize_and_load)
    notices = []
    load(notify=notices.append)
    assert notices == ["KLinearMarlin runs on GPUs only"]


def test_one_path_stands_for_both():
    folder, file = str(embedded_model()), str(next(embedded_model().glob("*.gguf")))
    assert loading.model_paths(folder, "") == (folder, folder) and loading.model_paths("", file) == (file, file)
    assert loading.model_paths("", "") == (folder, file)


def test_a_config_without_a_dtype_leaves_it_to_the_checkpoint(tmp_path):
    """As in transformers: bf16 weights are held in bf16."""
    folder = shutil.copytree(embedded_model(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    expected = AutoModelForCausalLM.from_pretrained(folder).dtype
    assert load(str(folder), str(folder / "model.safetensors"))[0].dtype == expected == torch.bfloat16


def test_a_model_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(KTransformersError, match=r"no readable config\.json"):
        read_config_and_tokenizer(str(tmp_path))


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(embedded_model() / name)
    with pytest.raises(KTransformersError, match="has no tokenizer, expected one of tokenizer.json"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"{broken", b"[1, 2]", b"\xff\xfe\x00", b'{"model_type": "qwen3_mo"}', b'{"model_type": "qwen3_moe", "hidden_size": "abc"}'],
    ids=repr,
)
@pytest.mark.parametrize("tokenizer", [False, True], ids=["without", "with"])
def test_a_broken_config_is_named_in_the_planners_words(tmp_path, content, tokenizer):
    """Whatever else the folder lacks."""
    folder = tmp_path / "model"
    if tokenizer:
        shutil.copytree(embedded_model(), folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(KTransformersError) as planned:
        read_config(folder)
    with pytest.raises(KTransformersError) as loaded:
        load(str(folder))
    assert str(loaded.value) == str(planned.value) and "config.json" in str(loaded.value)


def test_the_engine_imports_no_terminal():
    """So that a server can use it."""
    code = (
        "import sys, ktransformers.engine.load, ktransformers.engine.generate, ktransformers.engine.detokenize\n"
        "print([m for m in sys.modules if m.startswith(('typer', 'prompt_toolkit', 'ktransformers.cli'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_words_hold_back_unfinished_characters():
    tokenizer = read_config_and_tokenizer(str(embedded_model()))[1]
    words = Detokenizer(tokenizer)
    text = "Fenêtre → 中文 🙂 end"
    pieces = [words.add(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) + words.rest() == words.text == text
    assert not any("\ufffd" in piece for piece in pieces)
