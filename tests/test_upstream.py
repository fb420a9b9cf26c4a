"""Operator files and programs written to upstream's module paths find today's names there, and a line that says so."""

import importlib
import sys
import warnings

import pytest
import torch

from ktransformers import optimize_and_load
from ktransformers.loaders import GGUFLoader
from ktransformers.operators import base_operator
from ktransformers.optimize import optimize_and_load_gguf
from tests.tiny import meta_model, random_ids, relative_error

PATHS = {
    "util.custom_loader": ("ktransformers.loaders", {"GGUFLoader": GGUFLoader, "SafeTensorLoader": GGUFLoader, "ModelLoader": GGUFLoader}),
    "util.custom_gguf": ("ktransformers.loaders", {"GGUFLoader": GGUFLoader}),
    "util.utils": ("ktransformers.operators.base_operator", {"InferenceState": base_operator.InferenceState}),
    "util.inference_state": ("ktransformers.operators.base_operator", {"InferenceState": base_operator.InferenceState}),
    "optimize.optimize": ("ktransformers.optimize", {"optimize_and_load_gguf": optimize_and_load_gguf}),
    "models.custom_cache": ("transformers.StaticCache", {}),
}
GONE = {
    "util.custom_loader.ModelLoaderFactory": r"ktransformers\.open_weights",
    "util.custom_gguf.translate_name_to_gguf": r"gguf_loader\.tensor",
    "util.utils.prefill_and_generate": r"model\.generate",
    "optimize.optimize.gen_optimize_config": r"ktransformers\.plan",
    "models.custom_cache.KVC2StaticCache": r"past_key_values\.update",
}


def fresh(path, monkeypatch):
    """Import a module as if nobody had, with the warnings that it gives."""
    monkeypatch.delitem(sys.modules, f"ktransformers.{path}", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return importlib.import_module(f"ktransformers.{path}"), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("path", PATHS)
def test_an_older_path_has_todays_names_and_says_once_where_they_are(path, monkeypatch):
    today, names = PATHS[path]
    module, told = fresh(path, monkeypatch)
    assert len(told) == 1 and told[0].startswith(f"ktransformers.{path} is an older path, today's is {today}")
    assert {name: getattr(module, name) for name in names} == names
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", GONE)
def test_a_name_without_an_equivalent_says_what_to_use(name, monkeypatch):
    path, _, name_there = name.rpartition(".")
    fresh(path, monkeypatch)
    with pytest.raises(ImportError, match=GONE[name]):
        exec(f"from ktransformers.{path} import {name_there}")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from ktransformers.{path} import no_such_name")


OPERATOR = """
import torch
from torch import nn
from transformers import PretrainedConfig

from ktransformers.models.custom_cache import StaticCache
from ktransformers.models.modeling_deepseek_v3 import DeepseekV3MLP, apply_rotary_pos_emb
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.linear import KLinearBase
from ktransformers.util.custom_loader import GGUFLoader
from ktransformers.util.utils import InferenceState, load_weights, set_module


class Doubled(BaseInjectedModule, DeepseekV3MLP):
    def __init__(self, key: str, gguf_loader: GGUFLoader, config: PretrainedConfig, orig_module: nn.Module = None,
                 prefill_device: str = "cuda", generate_device: str = "cuda", **kwargs):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device, **kwargs)
        set_module(self, "act_fn", nn.SiLU())

    def load(self):
        for name, child in self.orig_module.named_children():
            load_weights(child, self.gguf_loader, f"{self.key}.{name}.")

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
"""


def test_an_operator_file_with_upstreams_imports_computes_what_transformers_computes(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "upstream_style_operator.py").write_text(OPERATOR)
    monkeypatch.syspath_prepend(tmp_path)
    operator = importlib.import_module("upstream_style_operator").Doubled
    reference, folder = checkpoint("deepseek_v3")
    kwargs = {"generate_device": "cpu", "prefill_device": "cpu"}
    rules = [
        {"match": {"name": r"shared_experts$"}, "replace": {"class": "upstream_style_operator.Doubled", "kwargs": kwargs}},
        {"match": {"name": r"shared_experts\.up_proj$"}, "replace": {"class": "default", "kwargs": {"generate_device": "cpu:0"}}},
    ]
    asked = {}  # tensor -> the device it was asked for

    def tensor(self, name, device="cpu", dtype=None, original=GGUFLoader.tensor):
        asked[name] = str(device)
        return original(self, name, device=device, dtype=dtype)

    monkeypatch.setattr(GGUFLoader, "tensor", tensor)
    model = optimize_and_load(meta_model(reference.config), rules, folder, default_device="cpu", progress=False)
    block = model.model.layers[2].mlp.shared_experts
    assert isinstance(block, operator) and isinstance(block.act_fn, torch.nn.SiLU)
    assert [asked[f"{block.key}.{name}_proj.weight"] for name in ("up", "down")] == ["cpu:0", "cpu"]
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-5
