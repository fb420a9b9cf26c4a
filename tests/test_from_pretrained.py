"""`from_pretrained(path, quantization_config=KTConfig(...))` makes the model that `optimize_and_load` makes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from ktransformers.models import DEFAULT_RULES, embedded_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ktransformers import KTConfig, optimize_and_load
from ktransformers.errors import DeviceError, KTransformersError, RuleError, UnsupportedError, WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.operators.base_operator import BaseInjectedModule
from tests.gguf_files.test_families import model_of
from tests.loaders import published
from tests.tiny import meta_model, random_ids, save, tiny_model

CPU = {"cuda": "cpu"}


def through_the_door(folder, rule, weights=None, devices=CPU, **options):
    given = KTConfig(rule, weights, devices=devices, progress=False)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, **options)


def by_hand(folder, rule, weights=None, devices=CPU):
    model = meta_model(AutoConfig.from_pretrained(folder))
    return optimize_and_load(model, rule, weights or folder, devices=devices, progress=False)


def same(found, expected, length=17):
    """The same logits to the last bit, the same greedy tokens, the same kinds of modules and devices."""
    ids = random_ids(2, length, vocab=80)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(found.generate(ids, **options), expected.generate(ids, **options))
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (found, expected)]
    assert kinds[0] == kinds[1]
    assert found.hf_device_map == expected.hf_device_map
    assert not any(module.training for module in found.modules())
    assert {n: (t.shape, t.dtype) for n, t in found.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in expected.state_dict().items()
    }


def test_every_family(checkpoint, family):
    folder = checkpoint(family)[1]
    found = through_the_door(folder, DEFAULT_RULES[family])
    assert any(isinstance(module, BaseInjectedModule) for module in found.modules())
    same(found, by_hand(folder, DEFAULT_RULES[family]))
    # Nothing of the detour is left on the model.
    assert not hasattr(found, "hf_quantizer") and not found.is_quantized
    assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize("model_type", ["gpt_oss", "glm4_moe", "qwen3_next", "lfm2_moe", "llama4_text"])
def test_other_families(model_type, tmp_path):
    """Transposed experts with biases, short convolutions, linear attention, tied embeddings: from safetensors and GGUF."""
    folder = save(model_of(model_type), tmp_path / "hf")
    same(through_the_door(folder, "Default"), by_hand(folder, "Default"))
    quantize_folder(folder, tmp_path / "m.gguf", "F16")
    expected = by_hand(folder, "Default", tmp_path / "m.gguf")
    same(through_the_door(folder, "Default", tmp_path / "m.gguf"), expected)
    config = AutoConfig.from_pretrained(folder)
    same(through_the_door(folder, "Default", tmp_path / "m.gguf", config=config), expected)


@pytest.fixture
def accelerate(monkeypatch):
    """transformers wants the package before it looks at a device_map; nothing of it is used on our way."""
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: True)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_one_device_or_auto_is_taken(checkpoint, accelerate, device_map):
    folder = checkpoint("qwen3_moe")[1]
    same(through_the_door(folder, "Qwen3-MoE", device_map=device_map), by_hand(folder, "Qwen3-MoE"))


def test_dtype_is_taken(checkpoint):
    folder = checkpoint("deepseek_v3")[1]
    model = through_the_door(folder, "DeepSeek-V3", dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_tied_weights_and_a_generation_config(tmp_path):
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model.generation_config = GenerationConfig(eos_token_id=[5, 7], temperature=0.3, do_sample=True)
    folder = save(model, tmp_path)
    found = through_the_door(folder, [{"match": {"name": "^model$"}, "replace": {"class": "default"}}], devices=None)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.generation_config.eos_token_id == [5, 7] and found.generation_config.temperature == 0.3
    given = GenerationConfig(eos_token_id=9)
    assert through_the_door(folder, "Qwen3-MoE", generation_config=given).generation_config.eos_token_id == 9


def test_a_gguf_beside_a_config_alone(checkpoint, tmp_path):
    """The folder has no safetensors; the weights lie elsewhere, or in it."""
    source = checkpoint("deepseek_v3")[1]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "config.json", alone)
    quantize_folder(source, tmp_path / "m.gguf", "F32")
    expected = by_hand(source, "DeepSeek-V3", tmp_path / "m.gguf")
    same(through_the_door(alone, "DeepSeek-V3", tmp_path / "m.gguf"), expected)
    (tmp_path / "m.gguf").rename(alone / "m.gguf")
    same(through_the_door(alone, "DeepSeek-V3"), expected)


def test_the_embedded_model():
    folder = embedded_model()
    same(through_the_door(folder, "DeepSeek-V3"), by_hand(folder, "DeepSeek-V3"))


def as_published(source, folder, form):
    """A copy of a checkpoint whose projections are stored in a quantized format, as its config says."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if re.search(r"_proj\.weight$", name):
            parts, _ = published.FORMATS[form][0](*tensor.shape, rng)
            tensors |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": published.FORMATS[form][3]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", ["fp8_block", "int4_packed", "gptq4", "awq4", "fp8_tensor"])
def test_a_quantized_checkpoint_is_left_to_our_loaders(checkpoint, tmp_path, form):
    """Whatever quantizer transformers has for it, or has not, and whether its packages are installed."""
    folder = as_published(checkpoint("qwen3_moe")[1], tmp_path / form, form)
    experts = {"class": "ktransformers.operators.experts.KTransformersExperts", "kwargs": {"generate_device": "cpu"}}
    rule = [{"match": {"trait": "experts"}, "replace": experts}]
    found = through_the_door(folder, rule, devices=None)
    same(found, by_hand(folder, rule, devices=None))
    assert not hasattr(found.config, "quantization_config")


def test_transformers_own_quantizers_are_as_before():
    """The way round theirs is taken for a KTConfig alone."""
    from transformers import FineGrainedFP8Config, GPTQConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    merged = AutoHfQuantizer.merge_quantization_configs({"quant_method": "fp8"}, FineGrainedFP8Config())
    assert isinstance(merged, FineGrainedFP8Config)
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config"):
        AutoHfQuantizer.merge_quantization_configs({"quant_method": "fp8"}, GPTQConfig(bits=4))


def test_a_snapshot_in_the_hubs_cache(checkpoint, tmp_path):
    """A model by its name on the hub: the weights are what transformers has downloaded."""
    source, cache = checkpoint("qwen2_moe")[1], tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, cache / "snapshots" / ("0" * 40))
    found = through_the_door("some/model", "Qwen2-MoE", cache_dir=tmp_path, local_files_only=True)
    same(found, by_hand(source, "Qwen2-MoE"))


def test_rules_that_cannot_be_read_are_one_error_before_anything_is_built():
    with pytest.raises(RuleError, match="KTConfig: no rule given. Pass rule="):
        KTConfig()
    with pytest.raises(RuleError, match="did you mean 'DeepSeek-V3'"):
        KTConfig("DeepSek-V3")
    with pytest.raises(RuleError, match="expected a YAML list of rules"):
        KTConfig(3)


REFUSED = [
    ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, DeviceError, "mapping of 2 modules.*Write a rule"),
    ({"use_kernels": True}, UnsupportedError, "found use_kernels.*Leave it out"),
    ({"key_mapping": {"a": "b"}}, UnsupportedError, "found key_mapping.*Rename"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_is_not_taken_is_said(checkpoint, accelerate, options, kind, message):
    with pytest.raises(kind, match=message):
        through_the_door(checkpoint("qwen3_moe")[1], "Qwen3-MoE", **options)


def test_wrong_weights_and_devices_are_one_error(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")[1]
    with pytest.raises(WeightError, match="no such file or folder"):
        through_the_door(folder, "Qwen3-MoE", tmp_path / "absent.gguf")
    with pytest.raises(WeightError, match="expected the path"):
        through_the_door(folder, "Qwen3-MoE", 3)
    with pytest.raises(KTransformersError, match="expected a mapping of device names"):
        through_the_door(folder, "Qwen3-MoE", devices="cpu")


def test_loading_shows_no_bar_of_its_own_and_leaves_transformers_bars_on(checkpoint, capsys):
    from transformers.utils import logging

    through_the_door(checkpoint("qwen3_moe")[1], "Qwen3-MoE")
    assert "Loading weights" not in capsys.readouterr().err and logging.is_progress_bar_enabled()
