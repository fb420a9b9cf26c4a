"""A caller's default dtype and device change nothing: neither what is loaded nor what is computed."""

import contextlib

import pytest
import torch
from transformers import AutoConfig

from ktransformers import optimize_and_load
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from tests.tiny import YARN, meta_model, random_ids, tiny_model

FAMILIES = {
    "deepseek_v2": "MLA", "deepseek_v3": "MLA", "qwen2_moe": "MoE", "qwen3_moe": "MoE", "mixtral": "MoE",
    "gpt_oss": "Default", "qwen3_next": "Default", "minimax_m2": "Default", "lfm2_moe": "Default",
}  # fmt: skip


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device():
    """What is made on it by mistake has no numbers, so nothing that is computed from it can be right."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {"bfloat16": lambda: default_dtype(torch.bfloat16), "float64": lambda: default_dtype(torch.float64),
            "meta": default_device}  # fmt: skip


def state(model):
    return dict((*model.named_parameters(), *model.named_buffers()))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors(tmp_path, family, default):
    rope = {"rope_parameters": YARN} if family in ("deepseek_v3", "qwen3_moe") else {}
    tiny_model(family, **rope).bfloat16().save_pretrained(tmp_path)
    config, ids = AutoConfig.from_pretrained(tmp_path), random_ids(1, 40)
    plain = optimize_and_load(meta_model(config), FAMILIES[family], tmp_path, progress=False)
    with DEFAULTS[default]():
        ours = optimize_and_load(meta_model(config), FAMILIES[family], tmp_path, progress=False)
        with torch.no_grad():
            found_logits = ours(ids, use_cache=False).logits  # transformers' sliding cache fails on meta
    expected, found = state(plain), state(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(found_logits, plain(ids, use_cache=False).logits)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_writing_and_reading_a_gguf(tmp_path, family, default):
    """Layouts that move rows, encoders, and what they make of numbers."""
    tiny_model(family).save_pretrained(tmp_path / "hf")
    made = {}
    for name, context in (("plain", contextlib.nullcontext), ("ours", DEFAULTS[default])):
        with context():
            quantize_folder(tmp_path / "hf", tmp_path / f"{name}.gguf", "Q4_K_M")
            weights = bind(open_weights(tmp_path / f"{name}.gguf"), meta_model(AutoConfig.from_pretrained(tmp_path / "hf")))
            made[name] = {key: weights.tensor(key, dtype=torch.float32) for key in weights.names()}
    for key, tensor in made["plain"].items():
        assert torch.equal(made["ours"][key], tensor), key


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kind", [kind for kind in QUANT_TYPES.values() if kind.unpack is not None], ids=lambda k: k.name)
def test_every_block_type(kind, default):
    data = torch.randint(0, 256, (4 * kind.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = Packed(data, kind, (4, kind.block))
    with DEFAULTS[default]():  # first: what is made once and kept is made here
        found = packed.dequantize()
    expected = packed.dequantize()
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and found.dtype == torch.float32
