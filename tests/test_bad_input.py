"""What users hand in by mistake, or what nobody expects, computes right or is one clear error before anything is loaded."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from ktransformers.models import embedded_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ktransformers import optimize_and_load
from ktransformers.engine.load import read_config_and_tokenizer
from ktransformers.errors import KTransformersError, RuleError, WeightError
from ktransformers.planner.plan import Planner
from tests import families
from tests.loaders import published
from tests.tiny import meta_model, random_ids, randomize, relative_error, save, tiny_config

CPU = {"cuda": "cpu"}
IDS = random_ids(1, 9)


def mixed(folder, truth, form_of):
    """(folder with the weights stored as `form_of(name)` says, the model with the numbers that they stand for)."""
    rng, state = np.random.default_rng(0), load_file(save(truth, folder) / "model.safetensors")
    tensors = {}
    for name, tensor in state.items():
        if form := form_of(name):
            parts, values = published.FORMATS[form][0](*tensor.shape, rng)
            tensors |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
            state[name] = torch.from_numpy(np.ascontiguousarray(values)).float()
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    plain = folder / "plain"
    plain.mkdir()
    save_file(state, plain / "model.safetensors")
    no_operators = [{"match": {"name": "^model$"}, "replace": {"class": "default"}}]
    return folder, optimize_and_load(meta_model(truth.config), no_operators, plain, default_device="cpu", progress=False)


def by_layer(forms):
    """The experts of layer i in `forms[i]`, everything else as it is."""
    found = re.compile(r"layers\.(\d+)\.mlp\.experts\.\d+\.")
    return lambda name: (layer := found.search(name)) and forms[int(layer[1])]


@pytest.mark.parametrize(
    "forms", [("int4_packed", None, None), ("fp8_block", "int4_packed", "gptq4"), (None, "awq4", "fp8_channel")], ids=str
)
def test_layers_may_differ_in_format(checkpoint, forms, tmp_path, exact):
    """As in checkpoints that leave some layers unquantized."""
    folder, truth = mixed(tmp_path, checkpoint("qwen3_moe")[0], by_layer(forms))
    model = optimize_and_load(meta_model(truth.config), "Default", folder, devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, truth(IDS).logits) < 1e-4


def test_projections_of_a_layer_may_differ_in_format(checkpoint, tmp_path, exact):
    """down_proj is often stored in more bits."""
    folder, truth = mixed(
        tmp_path, checkpoint("qwen3_moe")[0], lambda name: "int4_packed" if re.search(r"experts\.\d+\.(gate|up)", name) else None
    )
    model = optimize_and_load(meta_model(truth.config), "Default", folder, devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, truth(IDS).logits) < 1e-4


@pytest.mark.parametrize("form", ["int4_packed", "fp8_block"])
def test_experts_of_a_layer_that_differ_in_format(checkpoint, form, tmp_path, exact):
    """A conversion that stopped half way."""
    half = re.compile(r"layers\.1\.mlp\.experts\.[0-3]\.")
    folder, truth = mixed(tmp_path, checkpoint("qwen3_moe")[0], lambda name: form if half.search(name) else None)
    model = optimize_and_load(meta_model(truth.config), "Default", folder, devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, truth(IDS).logits) < 1e-4


def test_a_scale_that_is_missing(checkpoint, tmp_path):
    folder, _ = mixed(tmp_path, checkpoint("qwen3_moe")[0], by_layer(("fp8_block", None, None)))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.5.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.experts\.5\.up_proj\.weight.*scale"):
        optimize_and_load(meta_model(tiny_config("qwen3_moe")), "Default", folder, devices=CPU, progress=False)


def test_a_model_without_experts(tmp_path):
    config = AutoConfig.for_model("llama", **{n: families.SIZES[n] for n in ("hidden_size", "vocab_size", "num_hidden_layers")})
    with pytest.raises(RuleError, match=r"1 problem(.|\n)*LlamaForCausalLM \(trait 'experts' matches 0\)"):
        optimize_and_load(meta_model(config), "Default", tmp_path, devices=CPU)


def folder_without(tmp_path, *names, **config):
    """A copy of the embedded model's folder without some files, `config` merged into its config.json."""
    folder = shutil.copytree(embedded_model(), tmp_path / "model")
    for name in names:
        (folder / name).unlink()
    text = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(text))
    return str(folder)


def test_more_experts_chosen_than_there_are(tmp_path):
    """Found before the model is touched, and by kt plan, not inside the first forward pass."""
    model = meta_model(tiny_config("mixtral", num_experts_per_tok=9))
    with pytest.raises(KTransformersError, match="chooses 9 of 8 experts for each token. Correct"):
        optimize_and_load(model, "Mixtral", tmp_path, devices={"cuda": "cpu"})
    assert model.device.type == "meta"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(KTransformersError, match="config.json: .*chooses 9 of 8 experts"):
        Planner(str(tmp_path))


def test_a_tokenizer_that_is_missing(tmp_path):
    folder = folder_without(tmp_path, "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(KTransformersError, match="(tokenizer|chat template)"):
        read_config_and_tokenizer(folder)


def test_a_folder_with_code_of_its_own(tmp_path, monkeypatch):
    """It is not run, and nobody is asked on the terminal whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    code = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    folder = folder_without(tmp_path, model_type="mine", auto_map=code)
    with pytest.raises(KTransformersError, match="only code from the model's own repository does, and that is not run. .*trust_remote_code=True"):
        read_config_and_tokenizer(folder)


class MineConfig(Qwen3MoeConfig):
    model_type = "mine"


class MineForCausalLM(Qwen3MoeForCausalLM):
    config_class = MineConfig


def test_a_model_that_transformers_does_not_know(tmp_path):
    """As with trust_remote_code: a class of the user's own, with the experts module of transformers."""
    config = MineConfig(**{k: v for k, v in tiny_config("qwen3_moe").to_dict().items() if k != "model_type"})
    truth = randomize(MineForCausalLM._from_config(config).eval())
    with torch.device("meta"):
        model = MineForCausalLM._from_config(config)
    optimize_and_load(model, "Default", save(truth, tmp_path), devices=CPU, progress=False)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, truth(IDS).logits) < 1e-4
