"""Decoding's attention on the CPU: against fp32 arithmetic, beside torch's own, and inside models."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache

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


ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize(
    "sizes", [(1, 8, 2, 33, 16, 16), (3, 6, 6, 1, 32, 32), (2, 12, 1, 100, 64, 48), (1, 4, 4, 600, 16, 24)], ids=str
)
@pytest.mark.parametrize("size_of_keys", [1, 20_000])
def test_one_query_is_as_near_to_fp32_as_torch_s_own(sizes, mask, dtype, size_of_keys):
    """Some keys make scores that fp16 cannot hold before they are scaled."""
    batch, heads, _, cached, *_ = sizes
    query, key, value = inputs(*sizes, dtype)
    query, key = query * size_of_keys**0.5, key * size_of_keys**0.5
    if size_of_keys > 1 and dtype is torch.float16 and cached > 1:
        assert not (query @ key.repeat_interleave(heads // key.shape[1], 1).transpose(2, 3)).isfinite().all()
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
    assert error(found, expected) < ERRORS[dtype], (sizes, mask, dtype, size_of_keys)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("groups", [2, 4])
def test_a_sequence_that_may_look_at_nothing_stays_finite(dtype, groups):
    query, key, value = inputs(2, 4, groups, 9, 16, 16, dtype)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0] = False
    alone, _ = cpu_attention.attention(None, query[1:], key[1:], value[1:], None)
    found, _ = cpu_attention.attention(None, query, key, value, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1:], alone)


@pytest.mark.parametrize("what", ["two queries", "position bias", "dropout", "softcap", "sinks"])
def test_all_else_goes_to_transformers(monkeypatch, what):
    from transformers.integrations import sdpa_attention

    called = []
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **k: called.append(1) or (None, None))
    query, key, value = inputs(1, 4, 2, 9, 16, 16, torch.bfloat16)
    if what == "two queries":
        query = query.expand(-1, -1, 2, -1)
    more = {
        "position bias": {"position_bias": torch.zeros(1)}, "softcap": {"softcap": 30.0},
        "sinks": {"s_aux": torch.zeros(4)},
    }.get(what, {})  # fmt: skip
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
                first = model(ids, attention_mask=given, past_key_values=DynamicCache(config=config))
                more = None if given is None else torch.cat([given, torch.ones(2, 1, dtype=torch.long)], 1)
                ours = model(ids[:, :1], attention_mask=more, past_key_values=first.past_key_values).logits
                model.set_attn_implementation("sdpa")
                first = model(ids, attention_mask=given, past_key_values=DynamicCache(config=config))
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


def test_the_families_that_ask_for_sdpa_by_name_are_those_of_this_transformers():
    folder = Path(transformers.__file__).parent / "models"
    asking = {path.parent.name for path in folder.glob("*/modeling_*.py") if '"sdpa"' in path.read_text("utf-8")}
    assert asking == cpu_attention.ASK_FOR_SDPA


def test_gradients_pass_and_are_torch_s():
    query, key, value = (x.requires_grad_() for x in inputs(1, 4, 2, 9, 16, 16, torch.float32))
    truth(query, key, value, None, 0.25).square().sum().backward()
    expected = [x.grad.clone() for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    cpu_attention.attention(None, query, key, value, None, scaling=0.25)[0].square().sum().backward()
    for x, grad in zip((query, key, value), expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-5)


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
