"""What a model is held in where its config has no dtype: as from_pretrained holds it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import KTConfig, config_from_gguf, optimize_and_load
from ktransformers.errors import WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import checkpoint_dtype, open_weights
from tests.tiny import meta_model, random_ids, relative_error, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def silent(path, family="qwen3_moe", dtype=torch.bfloat16, **more):
    """A checkpoint of `dtype` whose config does not name it."""
    model = tiny_model(family, num_hidden_layers=4 if family == "qwen3_next" else 2).to(dtype)
    model.save_pretrained(path, **more)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k not in ("dtype", "torch_dtype")}))
    return path


def tensors_of(model):
    """Name -> dtype of everything that no operator holds."""
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def loaded(path, weights=None, **how):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **how)
    return optimize_and_load(model, "Default", weights or path, progress=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_readmes_snippet_is_held_as_from_pretrained_holds_it(tmp_path, family, dtype):
    """Tensor by tensor: inverse frequencies, correction biases and decays are float32 in a bfloat16 model too."""
    path = silent(tmp_path, family, dtype)
    theirs, ours = AutoModelForCausalLM.from_pretrained(path), loaded(path)
    held, wanted = tensors_of(ours), tensors_of(theirs)
    assert ours.dtype == theirs.dtype == dtype and ours.config.dtype == theirs.config.dtype
    assert {name: wanted[name] for name in held if name in wanted} == {n: d for n, d in held.items() if n in wanted}
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(ours(ids).logits, theirs(ids).logits) < {torch.float32: 1e-4}.get(dtype, 0.1)


def test_a_sharded_checkpoint_and_names_in_another_order_than_the_file(tmp_path):
    """transformers takes the first float of the first file by name; a file may begin with another."""
    path = silent(tmp_path / "sharded", max_shard_size="40KB")
    with open_weights(path) as files:
        assert len(files.paths) > 2 and checkpoint_dtype(files) == torch.bfloat16
    path = silent(tmp_path / "mixed")
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("lm_head.weight").half()
    save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    with open_weights(path) as files:
        assert checkpoint_dtype(files) == AutoModelForCausalLM.from_pretrained(path).dtype == torch.float16


@pytest.mark.parametrize("how", ["from_config", "to", "config", "default"])
def test_a_dtype_that_the_caller_chose_stays(tmp_path, how):
    path = silent(tmp_path)
    config = AutoConfig.from_pretrained(path)
    if how == "from_config":
        model = loaded(path, dtype=torch.float32)
    elif how == "config":
        config.dtype = torch.float32
        model = optimize_and_load(meta_model(config), "Default", path, progress=False)
    elif how == "to":
        model = optimize_and_load(meta_model(config).to(torch.float16), "Default", path, progress=False)
    else:
        torch.set_default_dtype(torch.float16)
        try:
            model = loaded(path)
        finally:
            torch.set_default_dtype(torch.float32)
    assert model.dtype == (torch.float16 if how in ("to", "default") else torch.float32)


def test_a_failed_load_leaves_dtype_and_config_as_they_were(tmp_path, monkeypatch):
    path = silent(tmp_path)
    model = meta_model(AutoConfig.from_pretrained(path))
    before = tensors_of(model)

    def fail(*_):
        raise WeightError("the disk is gone")

    monkeypatch.setattr("ktransformers.finish.tie", fail)
    with pytest.raises(WeightError, match="the disk is gone"):
        optimize_and_load(model, "Default", path, progress=False)
    assert tensors_of(model) == before and model.config.dtype is None
    monkeypatch.undo()
    assert optimize_and_load(model, "Default", path, progress=False).dtype == torch.bfloat16


@pytest.mark.parametrize("mix, dtype", [("F32", torch.float32), ("F16", torch.bfloat16), ("Q8_0", torch.bfloat16)])
def test_gguf_says_the_same_alone_and_beside_a_config(tmp_path, mix, dtype):
    path = silent(tmp_path / "hf")
    quantize_folder(path, tmp_path / "m.gguf", mix)
    assert config_from_gguf(tmp_path / "m.gguf").dtype == dtype
    assert loaded(path, tmp_path / "m.gguf").dtype == dtype
    (path / "model.safetensors").unlink()
    rule = KTConfig(rule="Default", weights=tmp_path / "m.gguf", progress=False)
    assert AutoModelForCausalLM.from_pretrained(path, quantization_config=rule).dtype == dtype
