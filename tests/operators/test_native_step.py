"""The native step on the CPU: attention and layers in one call, on a cache of pages, under all that transformers does."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from ktransformers import native, optimize_and_load
from ktransformers.errors import NativeError, UnsupportedError
from ktransformers.native.layers import Layers
from ktransformers.operators.layer import KDecoderLayer
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedCache, PagedWindowLayer, paged_cache
from ktransformers.operators.stack import Stack, decode_of
from tests import families
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

TYPES = ("qwen3_moe", "gpt_oss", "exaone_moe", "qwen3_next", "afmoe", "cohere2_moe")
"""Plain, sinks and windows, windows, mixed with delta nets, norms after its parts, attention beside the MLP."""


def made(model_type, tmp_path_factory):
    """transformers' own model and ours, of the same random weights."""
    torch.manual_seed(0)
    reference = randomize(AutoModelForCausalLM.from_config(families.config_of(model_type)).eval())
    folder = save(reference, tmp_path_factory.mktemp(model_type))
    model = optimize_and_load(meta_model(families.config_of(model_type)), "Default", folder,
                              devices={"cuda": "cpu"}, progress=False)  # fmt: skip
    return reference, model


@pytest.fixture(scope="module", params=TYPES)
def pair(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=("qwen3_next", "qwen3_5_moe_text"))
def hybrid(request, tmp_path_factory):
    """Of families that mix attention with delta nets."""
    return made(request.param, tmp_path_factory)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each native call computed."""
    counted = []
    original = Layers.forward

    def counting(self, *args, **kwargs):
        counted.append(len(self.layers))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Layers, "forward", counting)
    return counted


def plain_pair(pair):
    reference, model = pair
    if model.config.model_type != "qwen3_moe":
        pytest.skip("one family is enough")
    return reference, model


@torch.no_grad()
def test_a_model_of_native_layers_is_one_native_call(pair, calls):
    """Windows, chunks and padding on the left included."""
    reference, model = pair
    if model.config.model_type == "qwen3_next":
        pytest.skip("prompts of delta nets are not native")
    ids, whole = random_ids(3, 40), len(model.model.layers)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"attention_mask": mask, "position_ids": positions}):
        expected = reference(ids, **given).logits
        assert relative_error(model(ids, **given).logits[:, 5:], expected[:, 5:]) < 1e-4
        cache, found = paged_cache(model), []
        for begin, end in ((0, 7), (7, 30), (30, 31), (31, 40)):
            step = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]} if given else {}
            found.append(model(ids[:, begin:end], past_key_values=cache, **step).logits)
        assert relative_error(torch.cat(found, 1)[:, 5:], expected[:, 5:]) < 1e-4
    assert set(calls) == {whole}


@pytest.mark.parametrize("how", [
    {}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3},
    {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4},
])  # fmt: skip
def test_generate_gives_the_same_tokens(pair, how):
    reference, model = pair
    if model.config.model_type == "qwen3_next" and how.keys() & {"prompt_lookup_num_tokens", "cache_implementation"}:
        pytest.skip("transformers' own does not do that with delta nets")
    ids = random_ids(1, 9).repeat(1, 2)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **how}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_left_padded_batches(pair):
    reference, model = pair
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    rows = [model.generate(ids[i : i + 1, 12 - n :], max_new_tokens=10, do_sample=False, pad_token_id=0)
            for i, n in enumerate((7, 11, 12))]  # fmt: skip
    together = model.generate(ids, **options)
    if model.config.model_type != "qwen3_next":  # its delta nets see the padding in transformers, too
        assert all(torch.equal(row[0, -10:], together[i, -10:]) for i, row in enumerate(rows))


@torch.no_grad()
@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.1] * 8, "factor": 2.0,
     "original_max_position_embeddings": 32},
])  # fmt: skip
def test_angles_beyond_the_context_of_training(rope, tmp_path, monkeypatch):
    """Also of kinds that compute them anew for each length; then nothing else is looked up again."""
    config = families.config_of("qwen3_moe")
    config.max_position_embeddings, config.rope_parameters = 32, {"rope_theta": 1e4, **rope}
    reference = randomize(AutoModelForCausalLM.from_config(config).eval())
    model = optimize_and_load(meta_model(config), "Default", save(reference, tmp_path), devices={"cuda": "cpu"},
                              progress=False)  # fmt: skip
    made, original = [], Stack._make
    monkeypatch.setattr(Stack, "_make", lambda self, *given: made.append(1) or original(self, *given))
    ids, ours, theirs = random_ids(1, 60), paged_cache(model), DynamicCache(config=config)
    for begin, end in [(0, 20), *((i, i + 1) for i in range(20, 60))]:
        found = model(ids[:, begin:end], past_key_values=ours).logits
        expected = reference(ids[:, begin:end], past_key_values=theirs).logits
        assert relative_error(found, expected) < 1e-4
    assert len(made) == 1


@torch.no_grad()
def test_a_recorded_step_gives_the_logits_of_the_model(pair):
    """Over the ends of pages and of windows, and after somebody else changed the cache."""
    reference, model = pair
    if model.config.model_type == "qwen3_next":
        pytest.skip("delta nets do not go back")
    if model.config.model_type == "cohere2_moe":
        pytest.skip("it scales its logits")
    ids = random_ids(1, 150)
    cache = paged_cache(model)
    for layer in cache.layers:
        if isinstance(layer, PagedWindowLayer):
            layer.activate_past_recording()
    model(ids[:, :20], past_key_values=cache)
    decode = decode_of(model, cache)
    found = torch.stack([decode(int(token)).clone() for token in ids[0, 20:140]])
    expected = reference(ids).logits[0]
    assert relative_error(found, expected[20:140]) < 1e-4
    cache.crop(-70)
    assert relative_error(decode(int(ids[0, 70])), expected[70]) < 1e-4
    model(ids[:, 71:90], past_key_values=cache)
    assert relative_error(decode(int(ids[0, 90])), expected[90]) < 1e-4 and cache.get_seq_length() == 91


@torch.no_grad()
def test_what_a_recorded_step_would_pass_by_is_not_recorded(pair):
    _, model = plain_pair(pair)
    cache, two = paged_cache(model), paged_cache(model)
    assert decode_of(model, cache) is None and decode_of(model, DynamicCache()) is None  # nothing in them
    model(random_ids(1, 5), past_key_values=cache)
    model(random_ids(2, 5), past_key_values=two)
    assert decode_of(model, two) is None and decode_of(model, cache) is not None
    for module in (model, model.model, model.model.embed_tokens, model.model.layers[1].mlp, model.model.norm, model.lm_head):
        hook = module.register_forward_hook(lambda *_: None)
        assert decode_of(model, cache) is None, type(module)
        hook.remove()
    for module in (model.model.layers[0], model.model.layers[1].self_attn, model.model.layers[1].mlp.experts):
        module.forward = module.forward
        assert decode_of(model, cache) is None, type(module)
        del module.forward
    model.train()
    assert decode_of(model, cache) is None
    model.eval()
    head, model.lm_head = model.lm_head, nn.Sequential(model.lm_head)
    assert decode_of(model, cache) is None
    model.lm_head = head
    assert decode_of(model, cache) is not None
    with torch.enable_grad():
        assert decode_of(model, cache) is None


@torch.no_grad()
def test_a_head_that_does_more_is_not_recorded(tmp_path):
    """Granite divides its logits."""
    reference = randomize(AutoModelForCausalLM.from_config(families.config_of("granitemoe")).eval())
    model = optimize_and_load(meta_model(families.config_of("granitemoe")), "Default", save(reference, tmp_path),
                              devices={"cuda": "cpu"}, progress=False)  # fmt: skip
    cache = paged_cache(model)
    model(random_ids(1, 5), past_key_values=cache)
    assert decode_of(model, cache) is None


@torch.no_grad()
def test_sequences_of_different_lengths_decode_together(pair, calls):
    """As each alone, to the bit but for products of other shapes."""
    _, model = pair
    if model.config.model_type == "qwen3_next":
        pytest.skip("caches of delta nets do not go together")
    prompts, caches, alone = [random_ids(1, n, seed=n) for n in (3, 64, 41, 70)], [], []
    more = random_ids(4, 5, seed=9)
    for i, prompt in enumerate(prompts):
        caches.append(paged_cache(model))
        model(prompt, past_key_values=caches[-1])
        fresh = copy.deepcopy(caches[-1])
        alone.append(torch.cat([model(more[i : i + 1, j : j + 1], past_key_values=fresh).logits for j in range(5)], 1))
    cache = PagedCache.together(caches)
    calls.clear()
    where = torch.tensor([[prompt.shape[1]] for prompt in prompts])
    found = [model(more[:, j : j + 1], past_key_values=cache, position_ids=where + j).logits for j in range(5)]
    assert relative_error(torch.cat(found, 1), torch.cat(alone)) < 1e-5 and set(calls) == {len(model.model.layers)}
    assert [c.get_seq_length() for c in caches] == [3, 64, 41, 70] and cache.layers[0].pages.lengths == [8, 69, 46, 75]
    with pytest.raises(UnsupportedError, match="found sequences of 8 to 75 tokens in one batch"):
        model(more[:, :1], past_key_values=cache)
    with pytest.raises(NativeError, match="found sequences of"):
        _ = cache.layers[0].keys


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_transformers_is_used_as_it_is(pair, kind, calls):
    reference, model = plain_pair(pair)
    ids = random_ids(1, 9)
    cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=32)
    out = model(ids, past_key_values=cache)
    assert relative_error(out.logits, reference(ids).logits) < 1e-4
    assert out.past_key_values is cache and cache.get_seq_length() == 9 and not calls


@torch.no_grad()
def test_crop_and_go_on_is_a_fresh_start(pair):
    _, model = pair
    if model.config.model_type == "qwen3_next":
        pytest.skip("delta nets do not go back")
    ids = random_ids(1, 30)
    cache = paged_cache(model)
    for layer in cache.layers:
        if isinstance(layer, PagedWindowLayer):
            layer.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-12)
    again = model(ids[:, 18:], past_key_values=cache).logits
    assert relative_error(again, model(ids).logits[:, 18:]) < 1e-5


@torch.no_grad()
def test_a_window_that_moved_on_refuses_to_go_back(pair):
    _, model = pair
    cache = paged_cache(model)
    windows = [layer for layer in cache.layers if isinstance(layer, PagedWindowLayer)]
    if not windows:
        pytest.skip("no windows")
    window = windows[0].sliding_window
    model(random_ids(1, window + 100), past_key_values=cache)
    assert all(layer.pages.held_from == [101] for layer in windows)
    assert all(layer.pages.tables[0][0] is None for layer in windows)  # 64 tokens that nothing sees any more
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        windows[0].crop(-50)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(pair):
    _, model = plain_pair(pair)
    ids = random_ids(1, 70)
    cache = paged_cache(model)
    model(ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    a, b = random_ids(1, 3, seed=2), random_ids(1, 3, seed=3)
    for past, more in ((cache, a), (other, b)):
        found = model(more, past_key_values=past).logits
        assert relative_error(found, model(torch.cat((ids, more), 1)).logits[:, -3:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "limit"), [("f32", 1e-5), ("bf16", 3e-2), ("f16", 3e-3), ("q8_0", 3e-2)])
def test_kinds_of_caches(pair, kind, limit):
    _, model = plain_pair(pair)
    size = next(m for m in model.modules() if isinstance(m, PagedAttention)).attending.shape.size
    if kind == "q8_0" and size % 32:
        with pytest.raises(NativeError, match="multiples of 32"):
            model(random_ids(1, 3), past_key_values=paged_cache(model, kind))
        return
    ids = random_ids(1, 80)
    cache = paged_cache(model, kind)
    found = [model(piece, past_key_values=cache).logits for piece in ids.split([75, 1, 4], 1)]
    assert relative_error(torch.cat(found, 1), model(ids).logits) < limit


def test_an_unknown_kind_is_refused(pair):
    with pytest.raises(UnsupportedError, match="found type 'q4_0', expected one of f32, f16, bf16, q8_0, fp8"):
        paged_cache(pair[1], "q4_0")


@torch.no_grad()
def test_what_is_asked_for_between_layers_is_given(pair):
    reference, model = pair
    ids = random_ids(1, 6)
    ours, theirs = (m(ids, output_hidden_states=True) for m in (model, reference))
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert relative_error(mine, other) < 1e-4
    assert relative_error(model(ids).logits, theirs.logits) < 1e-4


@torch.no_grad()
def test_attentions_are_the_familys_own_code(pair):
    reference, model = plain_pair(pair)
    ids = random_ids(1, 6)
    for m in (model, reference):
        m.set_attn_implementation("eager")
    try:
        ours, theirs = (m(ids, output_attentions=True) for m in (model, reference))
    finally:
        for m in (model, reference):
            m.set_attn_implementation("sdpa")
    assert relative_error(ours.attentions[1], theirs.attentions[1]) < 1e-4


@torch.no_grad()
def test_a_hook_between_layers_is_called(pair, calls):
    _, model = plain_pair(pair)
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    ids = random_ids(1, 6)
    with_hook = model(ids).logits
    hook.remove()
    assert len(seen) == 1 and calls == [1] * len(model.model.layers)
    assert relative_error(with_hook, model(ids).logits) < 1e-5


@torch.no_grad()
def test_a_weight_that_changed_is_used(pair):
    _, model = plain_pair(pair)
    ids = random_ids(1, 6)
    before = model(ids).logits
    norm = model.model.layers[0].post_attention_layernorm.weight
    norm.mul_(2.0)
    changed = model(ids).logits
    norm.div_(2.0)
    assert relative_error(changed, before) > 1e-2 and relative_error(model(ids).logits, before) < 1e-5


@torch.no_grad()
def test_a_projection_that_was_replaced_is_used(pair):
    _, model = plain_pair(pair)
    ids = random_ids(1, 6)
    before = model(ids).logits
    attention = model.model.layers[0].self_attn
    original = attention.o_proj

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * original(x)

    attention.o_proj = Twice()
    changed = model(ids).logits
    attention.o_proj = original
    assert relative_error(changed, before) > 1e-3 and relative_error(model(ids).logits, before) < 1e-5


@torch.no_grad()
def test_a_forward_of_its_own_is_called(pair, calls):
    """As accelerate gives it to modules."""
    _, model = plain_pair(pair)
    ids = random_ids(1, 6)
    before = model(ids).logits
    for module in (model.model.layers[1], model.model.layers[1].self_attn, model.model.layers[0].mlp):
        seen, original = [], module.forward
        module.forward = lambda *args, o=original, s=seen, **kwargs: (s.append(1), o(*args, **kwargs))[1]
        assert relative_error(model(ids).logits, before) < 1e-5 and len(seen) == 1, type(module)
        del module.forward
    calls.clear()
    model(ids)
    assert calls == [len(model.model.layers)]


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(pair, tmp_path):
    _, model = plain_pair(pair)
    config = families.config_of("qwen3_moe")
    config.num_key_value_heads = 4
    other = optimize_and_load(meta_model(config), "Default", save(randomize(AutoModelForCausalLM.from_config(config)), tmp_path),
                              devices={"cuda": "cpu"}, progress=False)  # fmt: skip
    cache, ids = paged_cache(model), random_ids(1, 5)
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="found 2 heads of 16 and 16 values, expected 4 heads"):
        other(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reset", "reorder", "copy"])
def test_a_recorded_step_sees_what_happened_to_its_cache(pair, change):
    _, model = plain_pair(pair)
    ids, cache = random_ids(1, 70), paged_cache(model)
    model(ids[:, :20], past_key_values=cache)
    decode = decode_of(model, cache)
    decode(int(ids[0, 20]))
    tokens = ids[:, :21]
    if change == "crop":  # to the same length
        cache.crop(-4)
        model(ids[:, 60:64], past_key_values=cache)
        tokens = torch.cat((ids[:, :17], ids[:, 60:64]), 1)
    elif change == "reset":
        cache.reset()
        model(ids[:, 30:51], past_key_values=cache)
        tokens = ids[:, 30:51]
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([0]))
    else:
        kept = copy.deepcopy(cache)
    found = torch.stack([decode(token).clone() for token in (7, 8, 9)])
    whole = torch.cat((tokens, torch.tensor([[7, 8, 9]])), 1)
    assert relative_error(found, model(whole).logits[0, -3:]) < 1e-5 and cache.get_seq_length() == 24
    if change == "copy":
        again = model(torch.tensor([[5]]), past_key_values=kept).logits[0, -1]
        assert relative_error(again, model(torch.cat((tokens, torch.tensor([[5]])), 1)).logits[0, -1]) < 1e-5
    with pytest.raises(NativeError, match="decode: found token 128, expected one from 0 to 127"):
        decode(128)


@torch.no_grad()
def test_sequences_of_different_lengths_are_cropped_each(pair):
    _, model = plain_pair(pair)
    caches = [paged_cache(model) for _ in range(2)]
    for cache, n in zip(caches, (5, 9), strict=True):
        model(random_ids(1, n), past_key_values=cache)
    cache = PagedCache.together(caches)
    cache.crop(-3)
    assert cache.layers[0].pages.lengths == [2, 6]
    with pytest.raises(UnsupportedError, match="found sequences of 2 to 6 tokens"):  # positions of none of them
        model(random_ids(2, 1), past_key_values=cache, position_ids=torch.tensor([[2], [2]]))


class _Always(nn.Module):
    """A router that knows three experts."""

    def forward(self, hidden):
        ids = torch.arange(3).expand(hidden.shape[0], 3)
        return torch.zeros(hidden.shape[0], 8), torch.full(ids.shape, 1 / 3), ids


class _Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 2


@torch.no_grad()
@pytest.mark.parametrize("what", ["layer norm", "wrapped norm", "router", "wrapped experts", "last norm"])
def test_what_takes_the_place_of_a_part_computes(pair, what):
    reference, model = plain_pair(pair)
    ids, replaced = random_ids(1, 9), []
    model(ids)
    for m in (reference, model):
        layer = m.model.layers[1]
        parent, name = {"router": (layer.mlp, "gate"), "wrapped experts": (layer.mlp, "experts"),
                        "last norm": (m.model, "norm")}.get(what, (layer, "input_layernorm"))  # fmt: skip
        old = getattr(parent, name)
        new = _Always() if what == "router" else _Wrapped(old) if "wrapped" in what else nn.LayerNorm(64)
        replaced.append((parent, name, old))
        setattr(parent, name, new)
    try:
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    finally:
        for parent, name, old in replaced:
            setattr(parent, name, old)
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


@torch.no_grad()
def test_odd_arguments_are_the_familys_to_judge(pair):
    reference, model = plain_pair(pair)
    ids = random_ids(2, 6)
    where = torch.arange(6)[None]
    for given in ({"position_ids": where.int()}, {"position_ids": where + 3_000_000}, {"position_ids": where.float()},
                  {"position_ids": where - 9}, {"attention_mask": torch.ones(1, 6, dtype=torch.int64)}):  # fmt: skip
        assert relative_error(model(ids, **given).logits, reference(ids, **given).logits) < 1e-4
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


@torch.no_grad()
def test_fewer_layers_than_there_are(pair):
    reference, model = plain_pair(pair)
    ids = random_ids(1, 6)
    for m in (model, reference):
        m.config.num_hidden_layers = 1
    try:
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    finally:
        for m in (model, reference):
            m.config.num_hidden_layers = 2


@torch.no_grad()
def test_a_layer_alone_computes_itself(pair):
    _, model = plain_pair(pair)
    hidden = torch.randn(1, 4, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden, torch.arange(4)[None])
    first, second = (layer(hidden, position_embeddings=positions) for layer in model.model.layers[:2])
    assert not torch.equal(first, second) and not torch.equal(first, hidden)


@torch.no_grad()
def test_compile_sees_the_calls_as_operators(pair):
    _, model = plain_pair(pair)
    ids = random_ids(1, 6)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    assert relative_error(compiled(ids, use_cache=False).logits, expected) < 1e-5
    torch._dynamo.reset()


def test_generation_grows_no_page_twice(pair):
    """Memory of the cache is that of whole pages of each layer."""
    _, model = plain_pair(pair)
    cache = paged_cache(model)
    model.generate(random_ids(1, 60), past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert isinstance(cache, PagedCache)
    assert cache.nbytes == sum(2 * layer.pages.page_bytes for layer in cache.layers)
    assert all(isinstance(layer, KDecoderLayer) for layer in model.model.layers)


def test_threads_share_a_model(pair):
    """Each its own cache: the answers are those of one after the other."""
    _, model = pair
    prompts = [random_ids(1, 5 + i, seed=i) for i in range(4)]

    def answer(ids):
        return model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)

    expected = [answer(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(a, b) for a, b in zip(threads.map(answer, prompts), expected, strict=True))


def test_a_model_loaded_under_inference_mode(tmp_path):
    reference = randomize(AutoModelForCausalLM.from_config(families.config_of("qwen3_moe")).eval())
    folder = save(reference, tmp_path)
    with torch.inference_mode():
        model = optimize_and_load(meta_model(families.config_of("qwen3_moe")), "Default", folder,
                                  devices={"cuda": "cpu"}, progress=False)  # fmt: skip
        ids = random_ids(1, 6)
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


@torch.no_grad()
def test_a_cache_of_another_batch_is_refused(pair):
    _, model = plain_pair(pair)
    cache = paged_cache(model)
    model(random_ids(3, 5), past_key_values=cache)
    with pytest.raises(NativeError, match="found 2 sequences, expected the 3"):
        model(random_ids(2, 1), past_key_values=cache)


@torch.no_grad()
def test_parts_that_were_loaded_again_are_computed_anew(tmp_path, calls):
    reference = randomize(AutoModelForCausalLM.from_config(families.config_of("qwen3_moe")).eval())
    model = optimize_and_load(meta_model(families.config_of("qwen3_moe")), "Default", save(reference, tmp_path),
                              devices={"cuda": "cpu"}, progress=False)  # fmt: skip
    ids = random_ids(1, 6)
    model(ids)
    expected = model(ids).logits
    assert calls[-1] == len(model.model.layers)
    for part in (model.model.layers[1], model.model.layers[0].self_attn, model.model.layers[0].mlp.experts, model.model):
        part.unload()
        part.load()
        calls.clear()
        assert relative_error(model(ids).logits, expected) < 1e-5 and set(calls) == {len(model.model.layers)}


@torch.no_grad()
def test_a_config_that_says_otherwise_is_recognized_anew(tmp_path):
    """Of two models of one class and size, one cuts its queries, keys and values."""
    for clip in (None, 0.05):
        config = families.config_of("olmoe")
        config.clip_qkv = clip
        reference = randomize(AutoModelForCausalLM.from_config(config).eval())
        model = optimize_and_load(meta_model(config), "Default", save(reference, tmp_path / str(clip)),
                                  devices={"cuda": "cpu"}, progress=False)  # fmt: skip
        ids = random_ids(1, 6)
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
        assert all(m.native is not None for m in model.modules() if isinstance(m, PagedAttention))


@torch.no_grad()
def test_a_norm_after_a_part_is_observed_and_replaced(pair, calls):
    reference, model = pair
    if model.config.model_type != "afmoe":
        pytest.skip("it has such norms")
    ids, seen = random_ids(1, 9), []
    layer = model.model.layers[1]
    hook = layer.post_mlp_layernorm.register_forward_hook(lambda *given: seen.append(given[-1]))
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    hook.remove()
    assert len(seen) == 1 and seen[0].shape == (1, 9, 64)
    model(ids)
    assert calls[-1] == len(model.model.layers)
    for norm in (layer.post_attention_layernorm, reference.model.layers[1].post_attention_layernorm):
        norm.weight.mul_(2)  # in place: it was copied
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


@torch.no_grad()
def test_one_token_of_a_hybrid_is_one_native_call(hybrid, calls):
    """Prompts and padding stay with the family's code, layer by layer; what is in between and after is right."""
    reference, model = hybrid
    ids, whole = random_ids(3, 40), len(model.model.layers)
    expected, cache, found = reference(ids).logits, paged_cache(model), []
    for begin, end in ((0, 1), (1, 7), (7, 8), (8, 30), *((i, i + 1) for i in range(30, 40))):
        calls.clear()
        found.append(model(ids[:, begin:end], past_key_values=cache).logits)
        assert calls == [whole] or end - begin > 1 or not begin
        assert 1 in calls or end - begin == 1
    assert relative_error(torch.cat(found, 1), expected) < 1e-4
    single = paged_cache(model)
    alone = [model(ids[:1, :8], past_key_values=single).logits]
    alone += [model(ids[:1, i : i + 1], past_key_values=single).logits for i in range(8, 40)]
    # Products of other shapes: 4e-5 for Qwen3.5, whose states carry a difference on.
    assert relative_error(torch.cat(alone, 1), torch.cat(found, 1)[:1]) < 1e-4


def step_by_step(reference, ids, begin):
    """Logits of all tokens, those from `begin` on one by one: of 140 at once transformers' own are 1e-4 from exact ones
    with Qwen3.5, 5e-5 token by token."""
    cache = DynamicCache(config=reference.config)
    pieces = [ids[:, :begin], *ids[:, begin:].split(1, dim=1)]
    return torch.cat([reference(piece, past_key_values=cache).logits for piece in pieces], 1)[0]


@torch.no_grad()
def test_a_recorded_step_of_a_hybrid(hybrid):
    """Over the ends of pages, after others changed the cache, and never on a cache that is another's or empty."""
    reference, model = hybrid
    ids, cache = random_ids(1, 150), paged_cache(model)
    assert decode_of(model, cache) is None
    model(ids[:, :20], past_key_values=cache)
    decode, expected = decode_of(model, cache), step_by_step(reference, ids, 20)
    found = torch.stack([decode(int(token)).clone() for token in ids[0, 20:140]])
    assert relative_error(found, expected[20:140]) < 1e-4
    model(ids[:, 140:145], past_key_values=cache)
    kept = copy.deepcopy(cache)
    assert relative_error(decode(int(ids[0, 145])), expected[145]) < 1e-4
    cache.reorder_cache(torch.tensor([0]))  # moves what delta nets keep
    assert relative_error(decode(int(ids[0, 146])), expected[146]) < 1e-4
    with pytest.raises(RuntimeError):
        cache.crop(-1)
    again = model(ids[:, 145:147], past_key_values=kept).logits[0]
    assert relative_error(again, expected[145:147]) < 1e-4 and kept.get_seq_length() == cache.get_seq_length() == 147
    cache.reset()
    with pytest.raises(UnsupportedError, match="empty"):
        decode(5)
    model(ids[:, :9], past_key_values=cache)
    assert relative_error(decode(int(ids[0, 9])), expected[9]) < 1e-4


@torch.no_grad()
def test_a_step_of_a_hybrid_that_is_observed_or_trained(hybrid, calls):
    reference, model = hybrid
    ids, layer = random_ids(1, 8), model.model.layers[0]

    def step(**more):
        """Of the last token."""
        logits = []
        for m in (model, reference):
            cache = paged_cache(model) if m is model else DynamicCache(config=m.config)
            m(ids[:, :7], past_key_values=cache)
            calls.clear()
            logits.append(m(ids[:, 7:], past_key_values=cache, **more).logits)
        assert relative_error(*logits) < 1e-4

    step()
    model(ids)
    for part in (layer.linear_attn, layer.linear_attn.out_proj, layer):
        seen = []
        hook = part.register_forward_hook(lambda *given, seen=seen: seen.append(1))
        step()
        hook.remove()
        assert len(seen) == 2  # prompt and token
    with torch.enable_grad():
        step()
        assert model(ids).logits.shape == (1, 8, 128)
    cache = paged_cache(model)
    model(ids[:, :7], past_key_values=cache)
    calls.clear()
    model(ids[:, 7:], past_key_values=cache)
    assert calls == [len(model.model.layers)]


@torch.no_grad()
def test_a_padded_step_of_a_hybrid_is_the_familys(hybrid):
    reference, model = hybrid
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    where, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    for m, cache in ((model, paged_cache(model)), (reference, DynamicCache(config=reference.config))):
        m(ids[:, :11], attention_mask=mask[:, :11], position_ids=where[:, :11], past_key_values=cache)
        logits.append(m(ids[:, 11:], attention_mask=mask, position_ids=where[:, 11:], past_key_values=cache).logits)
    assert relative_error(*logits) < 1e-4


def test_a_cache_is_gone_through_as_transformers_own(pair):
    reference, model = pair
    ids, theirs, ours = random_ids(2, 30), DynamicCache(config=reference.config), paged_cache(model)
    with torch.inference_mode():
        reference(ids, past_key_values=theirs)
        model(ids, past_key_values=ours)
    if any(not hasattr(layer, "keys") for layer in theirs.layers):
        pytest.skip("transformers' own cannot be gone through")
    for (keys, values, window), (own_keys, own_values, own_window) in zip(theirs, ours, strict=True):
        assert window is None and own_window is None or window == own_window
        seen = min(keys.shape[2], own_keys.shape[2])
        for own, their in ((own_keys, keys), (own_values, values)):
            assert relative_error(own[:, :, -seen:], their[:, :, -seen:]) < 1e-4


def test_a_dtype_that_no_page_keeps_is_told_by_name(pair):
    _, model = plain_pair(pair)
    cache = paged_cache(model)
    with pytest.raises(UnsupportedError, match="cache: found torch.float64, expected float32"):
        cache.update(torch.zeros(1, 2, 3, 16, dtype=torch.float64), torch.zeros(1, 2, 3, 16, dtype=torch.float64), 0)
