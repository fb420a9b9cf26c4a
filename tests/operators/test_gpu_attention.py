"""Attention by kernels over pages of a GPU, without one: the same code, its kernels in Triton's interpreter on the CPU."""

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache

from ktransformers import native, optimize_and_load
from ktransformers.engine import graphs, sampling
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.compare_caches import compare
from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import UnsupportedError
from ktransformers.kernels import compiler, gqa_decode, mla_decode
from ktransformers.machine.streams import registered
from ktransformers.operators import gpu_pages, paged_cache
from ktransformers.operators.fixed_cache import FixedCache
from ktransformers.operators.gpu_pages import GpuLayer, GpuPages
from ktransformers.operators.moe import ComputedInC
from tests.simulated_gpu import SimulatedStreams
from tests.tiny import meta_model, random_ids, relative_error

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
ON_GPU = compiler.triton is not None and torch.cuda.is_available() and not compiler.triton.knobs.runtime.interpret
"""`make test-gpu`: what needs no simulation runs there."""
DEVICE = "cuda:0" if ON_GPU else "cpu"

EXACT = 2e-5
"""float32 sums in another order, through three layers."""
ATTENTION = {"match": {"trait": "self_attention"}, "replace": {"class": "ktransformers.operators.gqa.KAttention"}}
LATENT = {"match": {"trait": "mla"}, "replace": {"class": "ktransformers.operators.attention.KDeepseekV2Attention"}}
LAYER = {"match": {"trait": "layer"}, "replace": {"class": "ktransformers.operators.layer.KDecoderLayer"}}
REST = [{"match": {"class": "torch.nn.Linear"}, "replace": {"class": "default"}}]
OF_EXPERTS = "ktransformers.operators.experts"
HYBRID = [{"match": {"trait": "moe_block"}, "replace": {"class": f"{OF_EXPERTS}.KMoEBlock"}},
          {"match": {"trait": "experts"}, "replace": {"class": f"{OF_EXPERTS}.KTransformersExperts"}}]  # fmt: skip
"""Experts on the CPU."""


@pytest.fixture
def attended(monkeypatch):
    """How many tokens each call of a kernel of attention had."""
    calls = []
    for module, name in ((gqa_decode, "gqa_decode"), (mla_decode, "mla_decode")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda q, *args, _kernel=kernel, **kwargs: (
            calls.append(tuple(q.shape[:2])), _kernel(q, *args, **kwargs))[1])  # fmt: skip
    return calls


@pytest.fixture
def loaded(checkpoint, request, monkeypatch):
    """Call with a family: transformers' model, and ours whose attention computes as it does on a GPU."""
    if not ON_GPU:
        request.getfixturevalue("interpreter")
    monkeypatch.setattr(gpu_pages, "LEAST_TOKENS", 64)

    def make(family, *rules, **overrides):
        reference, folder = checkpoint(family, **overrides)
        reference.folder = folder
        rules = [*(rules or [ATTENTION]), *REST]
        return reference, optimize_and_load(meta_model(reference.config), rules, folder, default_device=DEVICE)

    return make


@torch.inference_mode()
def logits(model, ids, cache, **kwargs):
    given = {"input_ids": ids, **kwargs}
    given = {name: value.to(model.device) for name, value in given.items()}
    return model(**given, past_key_values=cache, use_cache=True).logits.cpu()


@torch.inference_mode()
def assert_steps(reference, model, ids, sizes, plain=False, tolerance=EXACT):
    """A prompt and steps after it, of so many tokens each: the logits of a pass over all, which are kept in pages."""
    cache = gpu_pages.gpu_pages(model, plain=plain)
    assert all(type(layer) is GpuLayer for layer in cache.layers)
    expected = reference(input_ids=ids).logits
    for piece, part in zip(ids.split(sizes, 1), expected.split(sizes, 1), strict=True):
        assert relative_error(logits(model, piece, cache), part) < tolerance, f"at {cache.get_seq_length()}"
    assert cache.get_seq_length() == ids.shape[1]
    return cache


WINDOWS = ["sliding_attention", "full_attention"]
CASES = {
    "grouped": ("qwen3_moe", ATTENTION, {}),
    "windows and sinks": ("gpt_oss", ATTENTION, {"sliding_window": 20}),
    "sinks in windows": ("mimo_v2_flash", ATTENTION, {"sliding_window": 20}),
    "norms of all heads": ("olmo2", ATTENTION, {}),
    "1 + weight": ("gemma3_text", ATTENTION, {"sliding_window": 20}),
    "soft caps": ("gemma2", ATTENTION, {"sliding_window": 20, "attn_logit_softcapping": 3.0}),
    "neighbours turn": ("glm4", ATTENTION, {}),
    "no positions in some": ("smollm3", ATTENTION, {}),
    "growing queries": ("llama4_text", ATTENTION, {"floor_scale": 4, "attn_scale": 0.5}),
    "queries that are given factors": ("beam", ATTENTION, {"sliding_window": 20}),
    "gates": ("laguna", ATTENTION, {"gating": "per-element", "layer_types": WINDOWS, "sliding_window": 20}),
    "keys are values": ("gemma4_text", ATTENTION, {
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "layer_types": [*WINDOWS, "full_attention"],
        "num_hidden_layers": 3, "sliding_window": 20}),
    "latents": ("deepseek_v3", LATENT, {}),
    "latents, complex angles": ("deepseek_v2", LATENT, {}),
    "latents by the general name": ("deepseek_v3", ATTENTION, {}),
}  # fmt: skip
OF_MASKS = ["growing queries", "keys are values"]
"""Of decoders that are not known (masks of chunks, embeddings of layers): only a mask says that all is seen."""


@pytest.mark.parametrize("name, plain", [*((name, name not in OF_MASKS) for name in CASES), ("windows and sinks", False),
                                         ("latents", False)])  # fmt: skip
def test_steps_beyond_a_page(name, plain, loaded, attended):
    family, rule, overrides = CASES[name]
    reference, model = loaded(family, rule, **overrides)
    assert plain or name not in OF_MASKS or gpu_pages.gpu_pages(model, plain=True) is None
    assert_steps(reference, model, random_ids(2, 66), [62, 1, 3], plain)
    layers = len([m for m in model.modules() if getattr(m, "gpu", None) is not None])
    assert attended == [(2, 1)] * layers + [(2, 3)] * layers


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grouped", "windows and sinks", "latents", "gates"])
def test_half_precision(name, dtype, loaded, attended):
    """As near to float32 as transformers' own in that type, measured 0.75 to 1.01 of its error; of float16, absorbed
    queries are scaled before."""
    family, rule, overrides = CASES[name]
    reference, _ = loaded(family, rule, **overrides)
    config = copy.deepcopy(reference.config)
    config.dtype = dtype
    model = optimize_and_load(meta_model(config), [rule, *REST], reference.folder, default_device=DEVICE)
    half, ids = copy.deepcopy(reference).to(dtype), random_ids(1, 66)
    exact, expected = (one(input_ids=ids).logits[:, -1:] for one in (reference, half))
    cache = gpu_pages.gpu_pages(model)
    logits(model, ids[:, :65], cache)
    assert relative_error(logits(model, ids[:, 65:], cache), exact) < 1.3 * relative_error(expected, exact)
    assert cache.layers[0].pages[0].dtype == dtype and attended


@torch.inference_mode()
@pytest.mark.parametrize("length", [63, 64, 65, 128])
def test_borders_of_pages(length, loaded, attended):
    """Where the next token begins a page, ends one, and is in one with room for no more."""
    for family, rule in (("qwen3_moe", ATTENTION), ("deepseek_v3", LATENT)):
        reference, model = loaded(family, rule, num_hidden_layers=1)
        assert_steps(reference, model, random_ids(1, length + 1), [length - 1, 1, 1], plain=True)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["grouped", "windows and sinks", "latents"])
def test_generating_with_sequences_of_different_lengths(name, loaded, attended):
    """The shorter are filled up in front, beams take places in turn, and what masks say besides a window is kept to."""
    family, rule, overrides = CASES[name]
    reference, model = loaded(family, rule, **overrides)
    ids, mask = random_ids(3, 64), torch.ones(3, 64, dtype=torch.int64)
    for row, fill in enumerate((0, 3, 50)):
        ids[row, :fill] = mask[row, :fill] = 0
    for options in ({}, {"num_beams": 2})[: 2 if name == "grouped" else 1]:
        given = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False, **options}
        attended.clear()
        there = {**given, "attention_mask": mask.to(DEVICE)}
        assert torch.equal(model.generate(ids.to(DEVICE), **there).cpu(), reference.generate(ids, **given))
        assert len(attended) == model.config.num_hidden_layers
    hidden = torch.ones(3, 65, dtype=torch.int64)
    hidden[:, 60] = 0  # no window is like that
    cache, expected = gpu_pages.gpu_pages(model), DynamicCache(config=reference.config)
    attended.clear()
    for part, seen in ((ids[:, :64], hidden[:, :64]), (ids[:, :1], hidden)):
        found = logits(model, part, cache, attention_mask=seen)
        assert relative_error(found, logits(reference, part, expected, attention_mask=seen)) < EXACT
    assert not attended or family == "gpt_oss"  # whose windows hide it as well


def test_latents_in_fp8_and_what_that_changes(loaded, attended):
    """What `kt cache compare` says of it: measured on these random weights a divergence of 0.003 and 83 % of flat
    distributions' tops, and logits 8 % off."""
    reference, model = loaded("deepseek_v3", LATENT, kv_lora_rank=128, first_k_dense_replace=3)
    ids = random_ids(1, 70)
    own, found = compare(model, ids[0].tolist(), ["fp8"], 32)
    assert (own.bytes_per_token, found.bytes_per_token) == (3 * (128 + 8) * 4, 3 * (128 + 16 + 16))
    assert 0 < found.kl_mean < 1e-2 and own.kl_mean == 0 and found.same_top > 0.7
    with pytest.raises(UnsupportedError, match="cache: no layer of .* computes on pages of the CPU.* not made as q8_0"):
        compare(model, ids[0].tolist(), ["q8_0"])
    paged_cache.use(model, "fp8")
    cache = gpu_pages.gpu_pages(model)
    assert all(layer.fp8 and layer.pages == () for layer in cache.layers)
    with torch.inference_mode():
        expected = reference(input_ids=ids).logits
    attended.clear()
    parts = [logits(model, part, cache) for part in ids.split([60, 1, 3, 1, 5], 1)]
    assert EXACT < relative_error(torch.cat(parts, 1), expected) < 0.15
    assert cache.layers[0].pages[0].dtype == torch.uint8 and len(attended) == 3 * 4
    assert cache.layers[0].keys.shape == (1, 1, 70, 128) and cache.layers[0].values.shape == (1, 1, 70, 8)


def test_fp8_is_refused_or_said_where_there_are_no_latents(loaded):
    _, model = loaded("qwen3_moe")
    with pytest.warns(UserWarning, match="3 of 3 layers have no kernels for latents on a GPU, .* not fp8"):
        paged_cache.use(model, "fp8")
    assert not any(layer.fp8 for layer in gpu_pages.gpu_pages(model, kind="fp8").layers)
    with pytest.raises(UnsupportedError, match="keeps latents on a GPU, so its cache is not made as fp8"):
        compare(model, [1, 2, 3], ["fp8"])


@pytest.mark.skipif(ON_GPU, reason="a simulation")
@pytest.mark.parametrize("name", ["windows and sinks", "latents", "latents in FP8"])
def test_turns_of_a_conversation_by_one_graph(name, loaded, attended, monkeypatch):
    """Captured once, again when pages grow; it goes back in between. The length that it reads is the device's own."""
    family, rule, overrides = CASES[name.removesuffix(" in FP8")]
    reference, model = loaded(family, LAYER, rule, *HYBRID, **overrides)
    if "FP8" in name:
        paged_cache.use(model, "fp8")
    blocks_as_on_a_gpu(model)
    monkeypatch.setattr(sampling, "largest", lambda found: int(found.argmax()))
    monkeypatch.setattr(gpu_pages, "decoding_of", aside(gpu_pages.decoding_of))
    captured, made = [], graphs.GraphStep.__init__
    monkeypatch.setattr(graphs.GraphStep, "__init__", lambda self, *a: (captured.append(1), made(self, *a))[1])
    first = random_ids(1, 60)[0].tolist()
    then = [*first, *truth(reference, first, 5)[:1], *random_ids(1, 3, seed=5)[0].tolist()]
    cache = PrefixCache()
    with registered(torch.device("cpu"), SimulatedStreams(3)) as streams, streams.running():
        for prompt, count, graphs_made in ((first, 4, 1), (then, 6, 2)):
            assert answer(model, prompt, cache, count) == truth(reference, prompt, count)
            assert len(captured) == graphs_made and type(cache.cache) is GpuPages
    assert cache.cache.room.tokens == 128 and cache.cache.graph is not None and not streams.freed_too_early


def aside(function):
    """Of the host alone: the simulation would take its tensors for the GPU's."""

    def called(*args):
        with _disable_current_modes():
            return function(*args)

    return called


def truth(reference, ids, count):
    with _disable_current_modes():
        return reference.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


def answer(model, ids, cache, count):
    return list(generate(model, ids, max_new_tokens=count, sampling=Sampling(), cache=cache))


def blocks_as_on_a_gpu(model):
    for module in model.modules():
        if isinstance(module, ComputedInC):
            module.in_one_call = lambda *_: None


@torch.inference_mode()
@pytest.mark.parametrize("plain", [False, True])
def test_windows_keep_what_they_see_and_some_more(plain, loaded, attended, monkeypatch):
    """Beyond, pages are written to again; a prompt may be longer than they hold, and go on in pieces."""
    monkeypatch.setattr(gpu_pages, "BACK", 20)
    reference, model = loaded("gpt_oss", sliding_window=20)
    ids = random_ids(2, 230)
    cache = assert_steps(reference, model, ids, [150, 3, 1, 30, 46], plain)
    sliding, whole = cache.layers[:2]
    assert len(sliding.pages[0]) == 2 * 2 and len(whole.pages[0]) == 2 * 4 and len(attended) == 2 * len(cache.layers)
    assert sliding.can_forget(230 - 20) and not sliding.can_forget(100) and whole.can_forget(100)
    cache.crop(-20)
    expected = reference(input_ids=ids).logits[:, 210:212]
    assert relative_error(logits(model, ids[:, 210:212], cache), expected) < EXACT
    with pytest.raises(RuntimeError, match="crop: the window of 20 tokens has moved more than 20 tokens on"):
        cache.crop(-112)


@torch.inference_mode()
@pytest.mark.parametrize("more", [[], [LAYER]])
def test_numbers_that_are_changed_count(more, loaded, attended):
    """As they do for C: a module's, and its norms'."""
    reference, model = loaded("qwen3_moe", *more, ATTENTION)
    changed = copy.deepcopy(reference)
    for one in (changed, model):
        one.model.layers[1].self_attn.scaling *= 3
        for norm in (one.model.layers[2].self_attn.q_norm, one.model.layers[2].self_attn.k_norm):
            norm.variance_epsilon = 1.0
    assert_steps(changed, model, random_ids(1, 22), [20, 1, 1])
    assert len(attended) == 6


def test_going_back_and_choosing(loaded):
    reference, model = loaded("qwen3_moe")
    ids = random_ids(2, 70)
    cache = gpu_pages.gpu_pages(model)
    logits(model, ids[:, :66], cache)
    assert cache.nbytes == 3 * 2 * 128 * 2 * 2 * 16 * 4 and cache.layers[0].keys.shape == (2, 2, 66, 16)
    cache.crop(-5)
    other = copy.deepcopy(cache)
    for one in (cache, other):
        with torch.inference_mode():
            expected = reference(input_ids=ids[:, :64]).logits[:, 61:]
        assert relative_error(logits(model, ids[:, 61:64], one), expected) < EXACT and one.get_seq_length() == 64
    cache.batch_select_indices(torch.tensor([1]))
    with torch.inference_mode():
        expected = reference(input_ids=ids[1:, :65]).logits[:, -1:]
    assert relative_error(logits(model, ids[1:, 64:65], cache), expected) < EXACT
    with pytest.raises(UnsupportedError, match="cache: found 1 sequences, .*expected 2, "):
        logits(model, ids[:, :1], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop: found 2"):
        cache.layers[0].crop(2)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("name", ["grouped", "windows and sinks", "latents"])
def test_turns_of_a_conversation_on_a_gpu(name, loaded):
    family, rule, overrides = CASES[name]
    reference, model = loaded(family, rule, **overrides, **{"first_k_dense_replace": 3} if name == "latents" else {})
    prompt, cache = random_ids(1, 60)[0].tolist(), PrefixCache()
    for ids in (prompt, [*prompt, 5, 9]):
        assert answer(model, ids, cache, 8) == truth(reference, ids, 8)
    assert type(cache.cache) is GpuPages and cache.cache.stepped


@pytest.mark.skipif(ON_GPU, reason="a simulation")
def test_latents_without_kernels_take_the_fixed_cache(checkpoint, monkeypatch):
    reference, folder = checkpoint("deepseek_v3")
    model = optimize_and_load(meta_model(reference.config), [LATENT, *HYBRID, *REST], folder, default_device="cpu")
    blocks_as_on_a_gpu(model)
    for module in model.modules():
        if hasattr(module, "not_gpu"):
            module.native = None
    monkeypatch.setattr(sampling, "largest", lambda found: int(found.argmax()))
    ids, cache = random_ids(1, 9)[0].tolist(), PrefixCache()
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        assert answer(model, ids, cache, 4) == truth(reference, ids, 4)
    assert type(cache.cache) is FixedCache and cache.cache.graph is not None


def test_without_kernels_it_is_torch(checkpoint, interpreter, monkeypatch):
    monkeypatch.setenv("KT_KERNELS", "0")
    reference, folder = checkpoint("qwen3_moe")
    model = optimize_and_load(meta_model(reference.config), [ATTENTION, *REST], folder, default_device="cpu")
    operators = [module for module in model.modules() if hasattr(module, "not_gpu")]
    assert operators and all(one.gpu is None and one.not_gpu.startswith("KT_KERNELS=0") for one in operators)
    assert gpu_pages.gpu_pages(model) is None
    one = operators[0]
    one.devices = {one.key: "cuda:0"}
    with pytest.warns(UserWarning, match=f"attention on a GPU goes by torch alone, for KT_KERNELS=0 .*{one.key}"):
        one._look_for_kernels()


@pytest.mark.parametrize("family, reason", [("deepseek_v32", "an index of keys"), ("hy_v4", "an index of keys and .*sinks")])
def test_what_kernels_do_not_know_has_a_reason(family, reason, loaded):
    _, model = loaded(family)
    operators = [module for module in model.modules() if hasattr(module, "not_gpu")]
    assert operators and any(re.search(reason, one.not_gpu) for one in operators)
    assert gpu_pages.gpu_pages(model) is None
