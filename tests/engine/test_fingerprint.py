"""A model's fingerprint: the same wherever the same is loaded, another where anything changes what is computed."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ktransformers import native, optimize_and_load, optimize_rules
from ktransformers.engine.fingerprint import fingerprint
from tests.tiny import meta_model, save

CPU = {"cuda": "cpu"}


def loaded(config, folder, rule="Qwen3-MoE", **options):
    return optimize_and_load(meta_model(config), rule, folder, devices=CPU, progress=False, **options)


@pytest.fixture(scope="module")
def made(checkpoint):
    """A model's config, its folder, and the fingerprint."""
    folder = checkpoint("qwen3_moe", head_dim=32)[1]
    config = AutoConfig.from_pretrained(folder)
    return config, folder, fingerprint(loaded(config, folder))


def test_the_same_elsewhere(made, tmp_path):
    config, folder, expected = made
    there = shutil.copytree(folder, tmp_path / "elsewhere")
    model = loaded(AutoConfig.from_pretrained(there), there)
    assert fingerprint(model) == fingerprint(model, there) == expected and len(expected) == 32
    rules = tmp_path / "rules.yaml"
    rules.write_text("# other lines\n\n" + Path(optimize_rules.__file__).with_name("MoE.yaml").read_text())
    assert fingerprint(loaded(config, folder, str(rules))) == expected


def changed_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CHANGES = {
    "another config": lambda config, folder: setattr(config, "rms_norm_eps", 1e-3),
    "another rope": lambda config, folder: config.rope_parameters.update(rope_theta=5e5),
    "an expert": lambda config, folder: changed_tensor(folder, "model.layers.1.mlp.experts.5.down_proj.weight"),
    "a norm": lambda config, folder: changed_tensor(folder, "model.layers.2.input_layernorm.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_where_the_model_differs(made, tmp_path, change):
    config, folder, expected = copy.deepcopy(made[0]), shutil.copytree(made[1], tmp_path / "copy"), made[2]
    CHANGES[change](config, folder)
    assert fingerprint(loaded(config, folder)) != expected


def test_another_where_it_computes_otherwise(made):
    config, folder, expected = made
    nothing = [{"match": {"name": "^model$"}, "replace": {"class": "default"}}]
    found = [
        fingerprint(optimize_and_load(meta_model(config), nothing, folder, default_device="cpu", progress=False)),
        fingerprint(loaded(config, folder, cache="q8_0")),
        fingerprint(loaded(config, folder, cache="f16")),
        fingerprint(loaded(config, folder), extra=b"an adapter"),
    ]
    assert len({expected, *found}) == 5


def test_what_is_set_after_loading(made, monkeypatch):
    config, folder, expected = made
    model = loaded(config, folder)
    model.model.layers[0].mlp.norm_topk_prob = False
    other = loaded(config, folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    monkeypatch.setattr(native, "isa", lambda: "portable")
    lower = loaded(config, folder)
    assert len({expected, fingerprint(model), fingerprint(other), fingerprint(lower)}) == 4


def test_a_model_that_nothing_replaced(checkpoint, tmp_path):
    truth, folder = checkpoint("qwen3_moe", head_dim=32)
    own = fingerprint(truth)
    assert own != fingerprint(truth, folder) and own == fingerprint(copy.deepcopy(truth))
    changed = copy.deepcopy(truth)
    with torch.no_grad():
        changed.lm_head.weight.add_(1)
    assert fingerprint(changed) != own
    save(truth, tmp_path)
    assert fingerprint(truth, tmp_path) == fingerprint(truth, folder)
