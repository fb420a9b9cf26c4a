"""Decoding's attention on the CPU: against fp32 arithmetic, beside torch's own, and inside models."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ktransformers import optimize_and_load
from ktransformers.operators import cpu_attention
from tests.tiny import meta_model, random_ids


def inputs(batch, heads, groups, cached, size, width, dtype):
    torch.manual_seed(heads * cached)
    shapes = ((batch, heads, 1, size), (batch, groups, cached, size), (batch, groups, cached, width))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def truth(query, key, value, mask, scale):
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(repeat, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query.float(), key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def error(found, expected):
    return ((found.float() - expected).abs().mean() / expected.abs().mean()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("sizes", [(1, 8, 2, 33, 16, 16), (3, 6, 6, 1, 32, 32), (2, 12, 1, 100, 64, 48)], ids=str)
def test_one_query_is_as_near_to_fp32_as_torch_s_own(sizes, mask, dtype):
    batch, heads, _, cached, *_ = sizes
    query, key, value = inputs(*sizes, dtype)
    given = None
    if mask != "none":
        given = torch.rand(batch, heads if mask == "per head" else 1, 1, cached) > 0.3
        given[..., -1] = True
    expected = truth(query, key, value, given, 0.21)
    if mask == "float":
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(dtype).min).to(dtype)
    module = SimpleNamespace(num_key_value_groups=heads // key.shape[1], is_causal=True)
    found, weights = cpu_attention.attention(module, query, key, value, given, scaling=0.21)
    assert weights is None and found.shape == expected.shape and found.dtype == dtype
    assert error(found, expected) < (0.01 if dtype == torch.bfloat16 else 0.002), (sizes, mask, dtype)


@pytest.mark.parametrize("what", ["fp32", "two queries", "position bias", "dropout", "gradients"])
def test_all_else_goes_to_transformers(monkeypatch, what):
    from transformers.integrations import sdpa_attention

    called = []
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **k: called.append(1) or (None, None))
    query, key, value = inputs(1, 4, 2, 9, 16, 16, torch.float32 if what == "fp32" else torch.bfloat16)
    if what == "two queries":
        query = query.expand(-1, -1, 2, -1)
    query.requires_grad_(what == "gradients")
    more = {"position_bias": torch.zeros(1)} if what == "position bias" else {}
    cpu_attention.attention(None, query, key, value, None, dropout=0.1 if what == "dropout" else 0.0, **more)
    assert called




@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_a_bf16_model_decodes_by_it_with_and_without_padding(checkpoint, family, tmp_path):
    reference = copy.deepcopy(checkpoint(family)[0]).bfloat16()  # other tests have the same one
    config = reference.config
    reference.save_pretrained(tmp_path)
    config.dtype = torch.bfloat16
    meta = meta_model(config).bfloat16()
    meta.set_attn_implementation("sdpa")
    model = optimize_and_load(meta, "MoE", tmp_path, devices={"cuda": "cpu"}, progress=False)
    assert model.config._attn_implementation == cpu_attention.NAME
    used = []
    original = cpu_attention._is_ours
    cpu_attention._is_ours = lambda *a: used.append(original(*a)) or used[-1]
    try:
        ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
        mask[0, :4] = 0
        for given in (None, mask):
            with torch.no_grad():
                first = model(ids, attention_mask=given, use_cache=True)
                more = None if given is None else torch.cat([given, torch.ones(2, 1, dtype=torch.long)], 1)
                ours = model(ids[:, :1], attention_mask=more, past_key_values=first.past_key_values).logits
                model.set_attn_implementation("sdpa")
                first = model(ids, attention_mask=given, use_cache=True)
                theirs = model(ids[:, :1], attention_mask=more, past_key_values=first.past_key_values).logits
                model.set_attn_implementation(cpu_attention.NAME)
            assert error(ours, theirs.float()) < 0.05, (family, given is None)
    finally:
        cpu_attention._is_ours = original
    assert any(used) and not all(used)


def test_a_family_that_asks_for_sdpa_by_name_keeps_it(checkpoint):
    reference, folder = checkpoint("deepseek_v32")
    meta = meta_model(reference.config)
    meta.set_attn_implementation("sdpa")
    model = optimize_and_load(meta, "MoE", folder, progress=False)
    assert model.config._attn_implementation == "sdpa"


def test_a_config_that_says_so_serves_the_next_model_too(checkpoint):
    reference, folder = checkpoint("deepseek_v3")
    config = copy.deepcopy(reference.config)
    config._attn_implementation = "sdpa"
    for _ in range(2):
        model = optimize_and_load(meta_model(config), "MLA", folder, progress=False)
        assert model.config._attn_implementation == cpu_attention.NAME


def test_a_model_with_another_attention_keeps_it(checkpoint):
    reference, folder = checkpoint("qwen3_moe")
    meta = meta_model(reference.config)
    meta.set_attn_implementation("eager")
    model = optimize_and_load(meta, "MoE", folder, progress=False)
    assert model.config._attn_implementation == "eager"
