"""Kinds of attention that the walk over the families does not reach at its sizes: windows and chunks that the context
leaves, layers without positions, queries that grow, keys that are values, indices that choose among more than they keep.
"""

import copy
import functools

import pytest
import torch
from ktransformers.models.traits import TRAITS
from transformers import AutoModelForCausalLM, DynamicCache

from ktransformers import native, optimize_and_load
from ktransformers.engine.cache import PrefixCache
from ktransformers.operators.attending import attending_of
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedIndexedLayer, paged_cache
from tests import families
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

_WINDOWS = ["sliding_attention", "full_attention"]
_INDEX = "indexed_attention"
_SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared"] * 2, "index_topk": 6}
_LLAMA = {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "floor_scale": 4, "attn_scale": 0.5}

KINDS = {
    "layers without positions": ("cohere2_moe", {"num_hidden_layers": 4, "layer_types": _WINDOWS * 2, "sliding_window": 8}),
    "heads by layer": ("laguna", {"num_attention_heads_per_layer": [4, 8], "layer_types": _WINDOWS, "sliding_window": 8}),
    "softplus by element": ("laguna", {"gating": "per-element"}),
    "queries that are given factors": ("beam", {"sliding_window": 8}),
    "sinks in windows": ("mimo_v2_flash", {"sliding_window": 8}),
    "names": ("lfm2_moe", {}),
    "chunks": ("llama4_text", {**_LLAMA, "attention_chunk_size": 8}),
    "no norm of keys": ("llama4_text", {**_LLAMA, "use_qk_norm": False}),
    "no growth": ("llama4_text", {**_LLAMA, "attn_temperature_tuning": False}),
    "keys are values": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "sliding_window": 8,
                                        "num_hidden_layers": 3, "layer_types": [*_WINDOWS, "full_attention"]}),
    "index": ("deepseek_v32", {"index_topk": 6}),
    "shared index": ("glm_moe_dsa", _SHARED),
    "shared index, sinks": ("hy_v4", _SHARED),
    "index, gate in queries": ("axk2", {"index_topk": 6}),
    "index, norm of keys": ("dots3_note_text", {"index_topk": 6, "num_hidden_layers": 3, "sliding_window": 8,
                                                "layer_types": [_INDEX, "sliding_attention", _INDEX]}),
}  # fmt: skip
INDEXED = [kind for kind in KINDS if "index" in kind]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(transformers' model, ours) of a kind; made once."""

    @functools.cache
    def make(kind):
        family, fields = KINDS[kind]
        config = families.config_of(family, **fields)
        config.max_position_embeddings = 1024
        torch.manual_seed(0)
        truth = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        truth = randomize(truth.eval())
        folder = save(truth, tmp_path_factory.mktemp("model"))
        model = optimize_and_load(meta_model(truth.config), "Default", folder, devices={"cuda": "cpu"}, progress=False)
        attention = [module for module in model.modules() if isinstance(module, PagedAttention)]
        assert attention and all(module.native is not None for module in attention)
        return truth, model

    return make


def in_pieces(model, cache, ids, pieces):
    with torch.no_grad():
        parts = ids.split(pieces, 1)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


def plain(truth):
    return DynamicCache(config=truth.config)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_one_and_in_pieces(both, kind):
    truth, model = both(kind)
    ids = random_ids(1, 60)
    for pieces in ([60], [41, 1, 1, 17], [3, 1, 40, 1, 15]):
        expected = in_pieces(truth, plain(truth), ids, pieces)
        assert relative_error(in_pieces(model, paged_cache(model), ids, pieces), expected) < 1e-4, pieces
    with torch.no_grad():
        assert relative_error(model(ids, use_cache=False).logits, truth(ids, use_cache=False).logits) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_beams_and_padded_batches(both, kind):
    truth, model = both(kind)
    ids = random_ids(2, 23)
    for options in ({"max_new_tokens": 24}, {"max_new_tokens": 8, "num_beams": 3}):
        expected = truth.generate(ids, do_sample=False, **options)
        assert torch.equal(model.generate(ids, do_sample=False, **options), expected), options
    mask = (torch.arange(23) >= torch.tensor([[9], [0]])).long()
    expected = truth.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "names"])  # no crop takes a convolution's state back
def test_crop_and_go_on(both, kind):
    truth, model = both(kind)
    ids, other = random_ids(1, 50), random_ids(1, 20, seed=7)
    cache = paged_cache(model)
    in_pieces(model, cache, ids[:, :30], [30])
    for layer in cache.layers:  # a window keeps what it leaves behind
        if layer.is_sliding:
            layer.activate_past_recording()
    in_pieces(model, cache, ids[:, 30:], [1, 19])
    cache.crop(-20)
    expected = in_pieces(truth, plain(truth), torch.cat([ids[:, :30], other], 1), [30, 1, 19])[:, 30:]
    for one in (copy.deepcopy(cache), cache):
        assert relative_error(in_pieces(model, one, other, [1, 19]), expected) < 1e-4


@pytest.mark.parametrize("kind", INDEXED)
def test_torch_and_c_share_a_cache_with_an_index(both, kind):
    """Under gradients transformers' code computes, on what C kept, and the other way round."""
    truth, model = both(kind)
    ids, cache = random_ids(1, 40), paged_cache(model)
    assert any(isinstance(layer, PagedIndexedLayer) for layer in cache.layers)
    expected, found = in_pieces(truth, plain(truth), ids, [20, 1, 10, 9]), []
    for part, grad in zip(ids.split([20, 1, 10, 9], 1), (False, True, False, True), strict=True):
        with torch.set_grad_enabled(grad):
            found.append(model(part, past_key_values=cache, use_cache=True).logits.detach())
    assert relative_error(torch.cat(found, 1), expected) < 1e-4


@pytest.mark.parametrize("kind", ["index", "shared index"])
def test_a_long_prefill_with_an_index(both, kind):
    truth, model = both(kind)
    ids = random_ids(1, 600)
    expected = in_pieces(truth, plain(truth), ids, [500, 100])
    assert relative_error(in_pieces(model, paged_cache(model), ids, [500, 100]), expected) < 1e-4


def test_an_interrupted_step_leaves_no_key_of_an_index(both):
    truth, model = both("index")
    ids, prefix = random_ids(1, 30), PrefixCache()
    prefix.cache = paged_cache(model)
    with prefix.extending(ids[0, :20].tolist()):
        in_pieces(model, prefix.cache, ids[:, :20], [20])
    last = model.model.layers[-1].self_attn
    last.native.forward, kept = None, last.native.forward
    with pytest.raises(TypeError), prefix.extending([1, 2]):
        in_pieces(model, prefix.cache, torch.tensor([[1, 2]]), [2])
    last.native.forward = kept
    assert prefix.reuse(ids[0].tolist()) == 20
    expected = in_pieces(truth, plain(truth), ids, [20, 10])[:, 20:]
    assert relative_error(in_pieces(model, prefix.cache, ids[:, 20:], [10]), expected) < 1e-4


def test_layers_that_share_keys_stay_their_own():
    """The layers whose keys others read, and those that read them, are transformers' code; the rest are native."""
    config = families.config_of(
        "gemma4_text", num_hidden_layers=6, layer_types=_WINDOWS * 3, num_kv_shared_layers=2, num_key_value_heads=2
    )
    modules = [m for m in meta_model(config).modules() if TRAITS["self_attention"](m)]
    assert [attending_of(module) is not None for module in modules] == [True, True, False, False, False, False]


def test_a_mask_that_shows_what_is_ahead_is_not_parted():
    """C computes a long prefill in pieces, and what is ahead of a piece is not in its cache yet."""
    from ktransformers.operators.paged_attention import _looks_back

    mask = torch.ones(1, 1, 300, 310, dtype=torch.bool).tril(10)
    assert _looks_back(mask) and _looks_back(torch.zeros(1, 1, 300, 310).masked_fill(~mask, float("-inf")))
    mask[0, 0, 5, 20] = True
    assert not _looks_back(mask) and _looks_back(mask[:, :, :200, :210])


def test_queries_that_grow_do_so_by_their_own_sequence():
    from types import SimpleNamespace

    from ktransformers.operators.attending import Attending, Growth

    growth = Growth(0.5, 4.0)
    attending = Attending(shape=None, growth=growth)
    pages = SimpleNamespace(ragged=True, lengths=[2, 9])
    held = SimpleNamespace(pages=pages, get_seq_length=lambda: 2)
    expected = torch.stack([growth.at(2, 1), growth.at(9, 1)])
    assert torch.equal(attending.query_factor(held, 1, {}), expected) and expected[0] != expected[1]
