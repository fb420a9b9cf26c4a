"""Attention on latents in one native call: which families have it, and that they compute as transformers does whatever
is asked of the cache."""

import copy
import functools

import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from ktransformers.models.traits import TRAITS
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from ktransformers import native, optimize_and_load
from ktransformers.operators.attending_latents import attending_of
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedCache, PagedLayer, paged_cache
from tests import families
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

NATIVE = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "axk1", "longcat_flash", "bailing_hybrid",
          "kimi_linear")  # fmt: skip
SPARSE = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note", "dots3_note_text")
"""Families with an index over keys: see test_attention_kinds.py."""
PADDED = tuple(family for family in NATIVE if family not in ("bailing_hybrid", "kimi_linear"))
"""Without linear attention, whose state padding enters, and which no crop takes back."""


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_threads(None)
    native.set_isa(native.isas()[-1])


@functools.cache
def config_of(family, **overrides):
    config = families.config_of(family)
    config.max_position_embeddings = 512
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(transformers' model, ours) of a family under a rule file; made once."""

    @functools.cache
    def make(family, rule="Default", **overrides):
        torch.manual_seed(0)
        truth = AutoModelForCausalLM.from_config(
            config_of(family, **overrides), attn_implementation="eager", experts_implementation="eager"
        )
        truth = randomize(truth.eval())
        folder = save(truth, tmp_path_factory.mktemp(family))
        model = optimize_and_load(meta_model(truth.config), rule, folder, devices={"cuda": "cpu"}, progress=False)
        assert all(m.native is not None for m in model.modules() if isinstance(m, PagedAttention) and is_mla(m))
        return truth, model

    return make


def is_mla(module: nn.Module) -> bool:
    return TRAITS["mla"](module)


def in_pieces(model, cache, ids, pieces, **kwargs):
    with torch.no_grad():
        parts = ids.split(pieces, 1)
        return torch.cat([model(part, past_key_values=cache, use_cache=True, **kwargs).logits for part in parts], 1)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_which_families_are_native():
    found = {True: set(), False: set()}
    for family in families.known_here():
        modules = [m for m in meta_model(families.config_of(family)).modules() if is_mla(m)]
        if modules:
            known = {attending_of(module) is not None for module in modules}
            assert len(known) == 1, family
            found[known.pop()].add(family)
    assert found[True] == {*NATIVE, *SPARSE} and not found[False]


RULES = [(family, "Default") for family in NATIVE]
RULES += [(family, DEFAULT_RULES[family]) for family in NATIVE if DEFAULT_RULES.get(family)]


@pytest.mark.parametrize(("family", "rule"), RULES)
def test_logits_in_one_and_in_pieces(both, family, rule):
    truth, model = both(family, rule)
    ids = random_ids(1, 150)
    assert relative_error(logits(model, ids), logits(truth, ids)) < 1e-4
    for pieces in ([100, 1, 1, 20, 1, 27], [1, 63, 1, 64, 1, 20]):
        expected, cache = in_pieces(truth, DynamicCache(config=truth.config), ids, pieces), paged_cache(model)
        assert relative_error(in_pieces(model, cache, ids, pieces), expected) < 1e-4
    assert any(isinstance(layer, PagedLayer) and layer.joined for layer in cache.layers)


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_tokens_and_beams(both, family):
    truth, model = both(family)
    ids = random_ids(2, 11)
    made = []
    original = PagedCache.__init__

    def counted(self, layers):
        made.append(self)
        original(self, layers)

    PagedCache.__init__ = counted
    try:
        for options in ({"max_new_tokens": 32}, {"max_new_tokens": 12, "num_beams": 3}):
            expected = truth.generate(ids, do_sample=False, **options)
            assert torch.equal(model.generate(ids, do_sample=False, **options), expected), options
    finally:
        PagedCache.__init__ = original
    assert made


@pytest.mark.parametrize("family", PADDED)
def test_a_padded_batch_equals_its_sequences_alone(both, family):
    truth, model = both(family)
    short, long = random_ids(1, 5, seed=3), random_ids(1, 12, seed=4)
    ids = torch.cat([torch.nn.functional.pad(short, (7, 0)), long])
    mask = (torch.arange(12) >= torch.tensor([[7], [0]])).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 12:]
    for row, alone in zip(out, (short, long), strict=True):
        expected = truth.generate(alone, max_new_tokens=8, do_sample=False)[0, alone.shape[1] :]
        assert torch.equal(row, expected)


@pytest.mark.parametrize("family", PADDED)
def test_crop_and_go_on_and_a_second_turn(both, family):
    truth, model = both(family)
    ids, other = random_ids(1, 100), random_ids(1, 40, seed=7)
    cache = paged_cache(model)
    in_pieces(model, cache, ids, [90, 1, 9])
    cache.crop(-30)
    kept = copy.deepcopy(cache)
    expected = logits(truth, torch.cat([ids[:, :70], other], 1))[:, 70:]
    for one in (cache, kept):
        assert relative_error(in_pieces(model, one, other, [1, 39]), expected) < 1e-4
    answer = model.generate(ids[:, :20], max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    second = torch.cat([answer.sequences, other], 1)
    again = model.generate(second, past_key_values=answer.past_key_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, truth.generate(second, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("rule", ["Default", "DeepSeek-V3"])
def test_torch_and_c_share_a_cache(both, rule):
    """Attentions are only given by the other code, which finds what C kept, and the other way round."""
    truth, model = both("deepseek_v3", rule)
    ids, cache = random_ids(1, 30), paged_cache(model)
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache, use_cache=True, output_attentions=asked).logits
            for part, asked in zip(ids.split([10, 1, 5, 1, 13], 1), (False, True, False, True, False), strict=True)
        ]
    assert relative_error(torch.cat(parts, 1), logits(truth, ids)) < 1e-4


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_kinds_of_pages(both, kind):
    truth, model = both("deepseek_v3", qk_rope_head_dim=32, qk_head_dim=48, head_dim=32)
    ids = random_ids(1, 80)
    error = in_pieces(model, paged_cache(model, kind), ids, [70, 1, 9]) - logits(truth, ids)
    assert error.abs().median() < {"f16": 1e-3, "bf16": 0.02, "q8_0": 0.05}[kind]  # some tokens get another expert


def test_threads_change_nothing_and_instruction_sets_little(both):
    truth, model = both("glm4_moe_lite")
    ids = random_ids(1, 90)
    expected, found = logits(truth, ids), []
    for threads in (1, 3):
        native.set_threads(threads)
        found.append(in_pieces(model, paged_cache(model), ids, [80, 1, 9]))
    assert torch.equal(*found)
    for isa in native.isas():
        native.set_isa(isa)
        assert relative_error(in_pieces(model, paged_cache(model), ids, [80, 1, 9]), expected) < 1e-4


def test_a_cache_of_transformers_and_gradients_stay_with_the_other_code(both):
    truth, model = both("deepseek_v3")
    ids = random_ids(1, 9)
    with torch.no_grad():
        found = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    assert relative_error(found.logits, logits(truth, ids)) < 1e-4
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 64, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(3)[None])
    attention(hidden, position_embeddings=positions, attention_mask=None)[0].sum().backward()
    assert hidden.grad is not None


def test_one_dense_copy_of_kv_b(both):
    """C reads the memory of kv_b_proj itself."""
    _, model = both("deepseek_v3", "DeepSeek-V3")
    attention = model.model.layers[0].self_attn
    kept = {t.data_ptr() for t in attention.native._keep if isinstance(t, torch.Tensor)}
    assert attention._kv_b is None and attention.kv_b_proj.weight.data_ptr() in kept
