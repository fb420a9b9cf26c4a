"""Absorbed MLA: both forms agree, caches hold what transformers' hold, masks and chunks change nothing."""

import importlib
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StaticCache,
    cache_utils,
)
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs

from ktransformers.errors import UnsupportedError
from ktransformers.operators import attention_inputs
from ktransformers.operators.attention import KDeepseekV2Attention
from ktransformers.operators.base_operator import load_weights
from tests.dict_weights import DictWeights
from tests.tiny import YARN, meta_model, random_ids, relative_error, tiny_config, tiny_model

FAMILIES = pytest.mark.parametrize("mla", ["deepseek_v2", "deepseek_v3"])


def twin(mla, kv_b=None, **overrides):
    """(transformers' model, a model of the same weights with MLA operators built with `kwargs` on every
    layer).
    """
    kwargs = {k: overrides.pop(k) for k in ("absorb_for_prefill", "chunck_size") if k in overrides}
    truth = tiny_model(mla, **overrides)
    model, weights = meta_model(truth.config), DictWeights(truth.state_dict())
    for i, layer in enumerate(model.model.layers):
        key = f"model.layers.{i}.self_attn"
        layer.self_attn = KDeepseekV2Attention(key, weights, model.config, layer.self_attn, "cpu", **kwargs)
        if kv_b is not None:
            layer.self_attn.kv_b_proj = kv_b
    load_weights(model, weights)
    model.model.rotary_emb = truth.model.rotary_emb
    return truth, model.eval()


@FAMILIES
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("chunck_size", [1, 4, 1000])
def test_both_forms_and_any_chunk_equal_transformers(mla, absorb, chunck_size):
    truth, model = twin(mla, absorb_for_prefill=absorb, chunck_size=chunck_size, rope_parameters=YARN)
    for layer in model.model.layers:
        layer.self_attn.absorbing_is_cheaper = lambda *_: absorb
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits, truth(ids).logits) < 1e-5


@FAMILIES
def test_the_cache_holds_what_transformers_puts_there(mla):
    truth, model = twin(mla)
    ids = random_ids(1, 6)
    with torch.no_grad():
        ours, theirs = model(ids, use_cache=True).past_key_values, truth(ids, use_cache=True).past_key_values
    for mine, expected in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, expected.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, expected.values, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_a_cache_filled_by_transformers_is_continued(mla):
    truth, model = twin(mla)
    ids = random_ids(1, 9)
    cache = DynamicCache(config=truth.config)
    with torch.no_grad():
        truth(ids[:, :5], past_key_values=cache)
        assert (
            relative_error(model(ids[:, 5:], past_key_values=cache).logits, truth(ids).logits[:, 5:]) < 1e-5
        )


@FAMILIES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("absorb", [True, False])
def test_left_padding_in_chunks_equals_the_sequence_alone(mla, attention, absorb):
    truth, model = twin(mla, absorb_for_prefill=absorb, chunck_size=3)
    model.set_attn_implementation(attention)
    alone = random_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), alone], 1)
    ids = torch.cat([padded, random_ids(1, 10, seed=9)])
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [
            model(
                ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache
            ).logits
            for a, b in ((0, 3), (3, 8), (8, 10))
        ]
        found = torch.cat(found, 1)
        assert torch.isfinite(found).all()
        assert relative_error(found[0, 4:], truth(alone).logits[0]) < 1e-5
        assert relative_error(found[1], truth(ids[1:]).logits[0]) < 1e-5


def test_the_cheaper_form_is_absorbed_for_decoding_and_expanded_for_long_prompts():
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    original = type("Sizes", (nn.Module,), {})()
    vars(original).update(sizes)
    cheaper = KDeepseekV2Attention("a", None, None, original, "cpu").absorbing_is_cheaper
    assert cheaper(1, 2) and cheaper(1, 100_000) and cheaper(150, 100_000)
    assert not cheaper(200, 100_000) and not cheaper(4096, 4096)


@FAMILIES
def test_a_kv_b_proj_without_a_dense_weight_is_loaded_beside_it(mla):
    truth, model = twin(mla, kv_b=nn.Identity())
    assert model.model.layers[0].self_attn._kv_b is not None
    ids = random_ids(1, 6)
    with torch.no_grad():
        assert relative_error(model(ids).logits, truth(ids).logits) < 1e-5


@FAMILIES
def test_attention_weights_are_returned_when_asked_for_by_argument_or_config(mla):
    truth, model = twin(mla, chunck_size=2)
    ids = random_ids(2, 5)
    with torch.no_grad():
        expected = truth(ids, output_attentions=True).attentions
        assert model(ids).attentions is None
        found = model(ids, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    assert all(relative_error(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))


@FAMILIES
def test_bf16_stays_near_transformers_bf16(mla):
    truth, model = twin(mla)
    truth, model = truth.to(torch.bfloat16), model.to(torch.bfloat16)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, truth(ids).logits) < 0.05


@pytest.mark.parametrize("form", ["_absorbed", "_expanded"])
@pytest.mark.parametrize("queries, mask", [(1, None), (1, "bool"), (9, None), (9, "float")])
@pytest.mark.parametrize("wants_weights", [True, False])
def test_scores_that_fp16_cannot_hold_unscaled_stay_exact(form, queries, mask, wants_weights):
    """All keys have a large part in common: it makes every score large and changes no weight."""
    attention = twin("deepseek_v3", chunck_size=4)[1].model.layers[0].self_attn.half()
    generator = torch.Generator().manual_seed(queries)
    sizes = ((2, 4, queries, 16), (2, 4, queries, 8), (2, 1, 9, 32), (2, 1, 9, 8))
    q_nope, q_rot, latent, k_rot = (torch.randn(size, generator=generator) for size in sizes)
    q_rot, k_rot = (q_rot * 4 + 40).half(), (k_rot + 300).half()
    q_nope, latent = (q_nope * 4).half(), (latent + 300 * (form == "_absorbed")).half()
    assert (q_rot @ k_rot.transpose(2, 3)).isinf().all()
    if mask:
        mask = torch.rand(2, 1, queries, 9, generator=generator) > 0.3
        mask[..., 0] = True
    given = mask if mask is None or queries == 1 else torch.zeros(mask.shape).masked_fill(~mask, -60000.0)
    with torch.no_grad():
        half = mask if given is None else given if given.dtype == torch.bool else given.half()
        found, weights = getattr(attention, form)(q_nope, q_rot, latent, k_rot, half, wants_weights)
        wide = [x.float() for x in (q_nope, q_rot, latent, k_rot)]
        expected, _ = getattr(attention.float(), form)(*wide, given, False)
    assert found.isfinite().all() and (weights is not None) == wants_weights
    assert relative_error(found, expected) < 0.01


@FAMILIES
def test_gradients_pass(mla):
    truth, model = twin(mla)
    ids = random_ids(1, 6)
    grads = []
    for one in (truth, model):
        one.zero_grad()
        one(ids).logits.square().mean().backward()
        grads.append(one.model.layers[0].self_attn.kv_b_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_check_refuses_other_attention_and_bad_chunks():
    with torch.device("meta"):
        qwen = meta_model(tiny_config("qwen3_moe")).model.layers[0].self_attn
        mla = meta_model(tiny_config("deepseek_v3")).model.layers[0].self_attn
    check = KDeepseekV2Attention.check
    assert check("a", mla, {}) == check("a", mla, {"chunck_size": 512}) == []
    assert "found Qwen3MoeAttention" in check("a", qwen, {})[0]
    assert "chunck_size: 0" in check("a", mla, {"chunck_size": 0})[0]


def family_attention(model_type, name):
    """The attention module of layer 0 of a family's default config, on meta."""
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        return getattr(modeling, name)(config.get_text_config(), 0)


@pytest.mark.parametrize(
    "model_type, name",
    [
        ("deepseek_v2", "DeepseekV2Attention"),
        ("deepseek_v3", "DeepseekV3Attention"),
        ("glm4_moe_lite", "Glm4MoeLiteAttention"),
        ("youtu", "YoutuAttention"),
        ("axk1", "AXK1Attention"),
        ("minicpm3", "MiniCPM3Attention"),
    ],
)
def test_check_takes_the_families_that_compute_the_same(model_type, name):
    assert KDeepseekV2Attention.check("a", family_attention(model_type, name), {}) == []


@pytest.mark.parametrize(
    "model_type, name, difference",
    [
        ("longcat_flash", "LongcatFlashMLA", "factors of its own: mla_scale_kv_lora, mla_scale_q_lora"),
        ("mistral4", "Mistral4Attention", "a forward that also takes: position_ids"),
        ("kimi_linear", "KimiLinearAttention", "no rotary positions"),
        ("bailing_hybrid", "BailingHybridAttention", "parts of its own: g_proj"),
        ("dots3_note", "Dots3NoteTextAttention", "kv_lora_scale.*q_lora_scale"),
        ("deepseek_v32", "DeepseekV32Attention", "parts of its own: indexer"),
        ("hy_v4", "HYV4Attention", "gate_proj.*sinks"),
    ],
)
def test_check_refuses_families_that_compute_more(model_type, name, difference):
    pytest.importorskip(f"transformers.models.{model_type}", reason="a family younger than this transformers")
    (problem,) = KDeepseekV2Attention.check("a", family_attention(model_type, name), {})
    assert f"found {name} with" in problem
    assert re.search(difference, problem)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_check_refuses_implementations_whose_masks_it_cannot_read(implementation):
    attention = family_attention("deepseek_v3", "DeepseekV3Attention")
    attention.config._attn_implementation_internal = implementation
    (problem,) = KDeepseekV2Attention.check("a", attention, {})
    assert implementation in problem and "attn_implementation='sdpa' or 'eager'" in problem
    for known in ("sdpa", "eager", None):
        attention.config._attn_implementation_internal = known
        assert KDeepseekV2Attention.check("a", attention, {}) == []


CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic, by the config": lambda config: DynamicCache(config=config),
    "dynamic, sliding": lambda config: Cache(layers=[cache_utils.DynamicSlidingWindowLayer(64) for _ in range(3)]),
    "static": lambda config: StaticCache(config, max_cache_len=24),
    "static, sliding": lambda config: Cache(layers=[cache_utils.StaticSlidingWindowLayer(24, 64) for _ in range(3)]),
    "fp8": lambda config: Cache(layers=[cache_utils.Fp8QuantizedLayer() for _ in range(3)]),
}


@FAMILIES
@pytest.mark.parametrize("kind", CACHES)
def test_known_caches_give_what_they_give_transformers(mla, kind):
    truth, model = twin(mla)
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    for given in (None, mask):
        caches = [CACHES[kind](truth.config) for _ in range(2)]
        for begin, end in ((0, 7), (7, 9), (9, 10), (10, 11), (11, 12)):
            more = {} if given is None else {"attention_mask": given[:, :end]}
            with torch.no_grad():
                found, expected = (
                    one(ids[:, begin:end], past_key_values=cache, **more).logits[1]
                    for one, cache in zip((model, truth), caches, strict=True)
                )
            assert relative_error(found, expected) < 1e-4, (begin, given is None)


def test_the_layers_it_knows_are_those_of_the_caches_above_or_need_a_library():
    made = {type(layer).__name__ for make in CACHES.values() for layer in make(tiny_config("deepseek_v3")).layers}
    made |= {"DynamicLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer"}  # the last two derive from what is above
    made |= {"PagedLayer", "PagedWindowLayer"}  # test_latent_attention.py
    made |= {"FixedLayer", "GpuLayer"}  # test_gpu_attention.py
    assert {name.rpartition(".")[2] for name in attention_inputs.CACHE_LAYERS} == made
    for name in attention_inputs.CACHE_LAYERS:
        module, _, layer = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), layer), type)


class OwnCache(DynamicCache):
    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(keys, values, layer_idx)


class OwnLayer(cache_utils.DynamicLayer):
    pass


@pytest.mark.parametrize(
    "cache, name",
    [
        (lambda: OwnCache(), "OwnCache"),
        (lambda: Cache(layers=[OwnLayer() for _ in range(3)]), "OwnLayer"),
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (lambda: ((torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 8)),), "tuple"),
    ],
)
def test_a_cache_it_does_not_know_is_refused_by_name(cache, name):
    attention, hidden, positions = one_layer()
    with pytest.raises(UnsupportedError, match=rf"found a cache.*{name}.*DynamicCache, StaticCache"):
        attention(hidden, past_key_values=cache(), position_embeddings=positions)


def one_layer():
    _, model = twin("deepseek_v3")
    hidden = torch.randn(1, 3, 64)
    return model.model.layers[0].self_attn, hidden, model.model.rotary_emb(hidden, torch.arange(3).unsqueeze(0))


@pytest.mark.parametrize("name", ["cache", "block_table", "read_index", "write_index", "cu_seq_lens_q", "seq_idx"])
def test_arguments_of_paged_and_packed_attention_are_refused_by_name(name):
    attention, hidden, positions = one_layer()
    with pytest.raises(UnsupportedError, match=f"KDeepseekV2Attention: found the argument '{name}'"):
        attention(hidden, position_embeddings=positions, **{name: torch.arange(3)})
    attention(hidden, position_embeddings=positions, **{name: None})
    with pytest.raises(UnsupportedError, match="'is_causal' and no mask"):
        attention(hidden, position_embeddings=positions, is_causal=False)


@pytest.mark.parametrize("told", [{"cu_seq_lens_q": [0, 3], "cu_seq_lens_k": [0, 3]}, {"seq_idx": [[0, 0, 0]]}], ids=["ends", "numbers"])
def test_a_packed_row_of_one_sequence_is_plainly_causal(told):
    """A packing collator's last row, for which transformers makes no mask."""
    attention, hidden, positions = one_layer()
    expected = attention(hidden, position_embeddings=positions)[0]
    told = {name: torch.tensor(value, dtype=torch.int32) for name, value in told.items()}
    assert torch.equal(attention(hidden, position_embeddings=positions, **told)[0], expected)


def test_every_argument_that_transformers_hands_down_is_known():
    """What neither changes numbers nor is refused, so that a new one is looked at."""
    harmless = {
        "input_ids", "attention_mask", "position_ids", "num_items_in_batch", "output_hidden_states",
        "output_attentions", "output_router_logits", "max_length_q", "max_length_k", "logits_indices",
        "logits_processor_args", "use_cache", "is_causal",
    }  # fmt: skip
    handed = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__}
    assert handed == harmless | attention_inputs.PAGED | attention_inputs.PACKED


def test_an_implementation_set_later_is_refused_by_name():
    attention, hidden, positions = one_layer()
    attention.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(UnsupportedError, match=r"attn_implementation 'paged\|sdpa'.*set_attn_implementation"):
        attention(hidden, position_embeddings=positions)


def test_continuous_batching_ends_with_a_named_error_and_no_tokens(caplog):
    """Before, every token but the first was wrong, without an error."""
    _, model = twin("deepseek_v3")
    model.set_attn_implementation("sdpa")
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    try:
        outputs = model.generate_batch(
            [[3, 4, 5], [6, 7]], generation_config=settings, continuous_batching_config=batching, progress_bar=False
        )
    except UnsupportedError as error:
        assert "paged" in str(error)
        return
    assert all(not output.generated_tokens for output in outputs.values())
    said = [str(output.error) for output in outputs.values()] + [str(r.exc_info or r.getMessage()) for r in caplog.records]
    assert any("KDeepseekV2Attention" in text and "paged" in text for text in said), said


def test_a_mask_it_cannot_read_is_refused():
    attention, hidden, positions = one_layer()
    with pytest.raises(UnsupportedError, match="4-D masks, found a 2-D tensor"):
        attention(hidden, attention_mask=torch.ones(1, 3), position_embeddings=positions)
