"""Decoding by captured graphs, on a simulated GPU: the same tokens as transformers', over turns, growth and going back."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from ktransformers import native, optimize_and_load
from ktransformers.engine import graphs, outside, sampling
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.generate import Timing, generate
from ktransformers.engine.sampling import Sampling
from ktransformers.machine.streams import registered
from ktransformers.operators import fixed_cache
from ktransformers.operators.fixed_cache import FixedCache
from ktransformers.operators.moe import SparseMoEBlock
from tests.simulated_gpu import SimulatedStreams
from tests.tiny import meta_model, random_ids

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
OPERATORS = "ktransformers.operators.experts"
BLOCKS = {
    "deepseek_v3": ("transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE", "KDeepseekV3MoE"),
    "qwen3_moe": ("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock", "KQwen3MoeSparseMoeBlock"),
}


TABLE = {"match": {"trait": "embedding"}, "replace": {"class": "ktransformers.operators.embedding.KTransformersEmbedding"}}
DECODER = {"match": {"trait": "decoder"}, "replace": {"class": "ktransformers.operators.models.DecoderModel"}}
HEAD = {"match": {"name": "^lm_head$"}, "replace": {"class": "ktransformers.operators.linear.KTransformersLinear",
                                                    "kwargs": {"generate_op": "KLinearCPUInfer"}}}  # fmt: skip


@pytest.fixture
def loaded(checkpoint, monkeypatch):
    """Call with a family: transformers' model, and ours whose parts compute as they do on a GPU, experts on the CPU."""
    monkeypatch.setattr(sampling, "largest", lambda logits: int(logits.argmax()))  # as for logits on a GPU

    def make(kind, *more):
        reference, folder = checkpoint(kind)
        found, operator = BLOCKS[kind]
        rules = [*more, {"match": {"class": "torch.nn.Linear"}, "replace": {"class": "default"}},
                 {"match": {"class": found}, "replace": {"class": f"{OPERATORS}.{operator}"}},
                 {"match": {"trait": "experts"}, "replace": {"class": f"{OPERATORS}.KTransformersExperts"}}]  # fmt: skip
        model = optimize_and_load(meta_model(reference.config), rules, folder, default_device="cpu")
        for module in model.modules():
            if isinstance(module, SparseMoEBlock):
                module.in_one_call = lambda *_: None
        return reference, model

    return make


def answer(model, ids, cache, count=8, timing=None):
    return list(generate(model, ids, max_new_tokens=count, sampling=Sampling(), cache=cache, timing=timing))


def truth(reference, ids, count=8):
    return reference.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


def ids(count, seed=0):
    return random_ids(1, count, seed=seed)[0].tolist()


@pytest.mark.parametrize("kind", BLOCKS)
def test_turns_of_a_conversation_go_by_one_graph_until_its_memory_moves(kind, loaded, monkeypatch):
    reference, model = loaded(kind)
    monkeypatch.setattr(fixed_cache, "LEAST_TOKENS", 32)
    monkeypatch.setattr(FixedCache.__init__, "__defaults__", (32,))
    captured = []
    made = graphs.GraphStep.__init__
    monkeypatch.setattr(graphs.GraphStep, "__init__", lambda self, *a: (captured.append(1), made(self, *a))[1])
    one = ids(9)
    two = one + truth(reference, one)[:5] + ids(4, 1)  # goes back three tokens, and on
    three = two + truth(reference, two) + ids(3, 2)  # beyond 32 tokens
    expected = [truth(reference, prompt) for prompt in (one, two, three)]
    for seed in range(2):
        captured.clear()
        cache, timing = PrefixCache(), Timing()
        with registered(torch.device("cpu"), SimulatedStreams(seed)) as streams, streams.running():
            assert answer(model, one, cache) == expected[0] and len(captured) == 1 and type(cache.cache) is FixedCache
            assert answer(model, two, cache, timing=timing) == expected[1] and len(captured) == 1
            assert timing.reused_tokens == 14
            assert answer(model, three, cache) == expected[2] and len(captured) == 2 and cache.cache.room == 64
        assert not streams.freed_too_early


@pytest.mark.parametrize("kind, more", [("qwen3_moe", [TABLE, DECODER]), ("deepseek_v3", [TABLE, DECODER, HEAD])])
def test_tables_and_heads_on_the_cpu_are_outside_of_the_graph(kind, more, loaded, monkeypatch, exact):
    """As packaged rules put them; a decoder with several devices moves what flows, by hooks."""
    monkeypatch.setattr("ktransformers.operators.models.canonical", lambda place: "cuda:0")
    reference, model = loaded(kind, *more)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.table is not None and model.model.layers[0]._forward_pre_hooks
    prompt = ids(9)
    expected, looked_up = truth(reference, prompt), []
    monkeypatch.setattr(outside, "head_of", aside(outside.head_of))
    monkeypatch.setattr(outside.Row, "look_up", recorded(outside.Row.look_up, looked_up))
    for seed in range(3):
        cache = PrefixCache()
        looked_up.clear()
        with registered(torch.device("cpu"), SimulatedStreams(seed)) as streams, streams.running():
            assert answer(model, prompt, cache) == expected
        assert cache.cache.graph._head is (head if HEAD in more else None)
        assert len(looked_up) == 6 and not streams.freed_too_early
        assert model.get_input_embeddings() is table


def aside(function):
    """Of the host alone: the simulation would take its tensors for the GPU's."""

    def called(*args):
        with _disable_current_modes():
            return function(*args)

    return called


def recorded(function, calls):
    return lambda self, *args, **kwargs: (calls.append(1), function(self, *args, **kwargs))[1]


def test_ids_that_a_family_makes_are_no_step_of_a_graph(loaded):
    """What is looked up outside must be the step's token."""
    reference, model = loaded("qwen3_moe", TABLE)
    table = model.model.embed_tokens
    forward = type(model.model).forward
    changed = lambda self, input_ids, **kwargs: forward(self, input_ids=input_ids + 0, **kwargs)  # noqa: E731
    model.model.forward = changed.__get__(model.model)
    cache, expected = PrefixCache(), truth(reference, ids(9))
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        with pytest.warns(UserWarning, match="without a graph on cpu: UnsupportedError.*found ids that were computed"):
            assert answer(model, ids(9), cache) == expected
    assert not cache.cache.graphable and model.get_input_embeddings() is table


def test_without_a_graph_where_it_is_not_wanted_or_cannot_be(loaded, monkeypatch):
    reference, model = loaded("qwen3_moe")
    prompt = ids(9)
    expected = truth(reference, prompt)
    monkeypatch.setenv("KT_GRAPHS", "0")
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        cache = PrefixCache()
        cache.cache = FixedCache(model.config)
        assert answer(model, prompt, cache) == expected and cache.cache.graph is None
    monkeypatch.delenv("KT_GRAPHS")
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        cache = PrefixCache()
        assert answer(model, prompt, cache) == expected and cache.cache.graph is None and not cache.cache.graphable
    hook.remove()
    asks = model.model.norm.forward
    model.model.norm.forward = lambda x: asks(x) if x.sum().item() else x
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        cache = PrefixCache()
        with pytest.warns(UserWarning, match="without a graph on cpu: CaptureError"):
            assert answer(model, prompt, cache) == expected
        assert not cache.cache.graphable


@torch.inference_mode()
def test_only_layers_that_keep_all_tokens(checkpoint):
    assert fixed_cache.fixed_cache(checkpoint("gpt_oss")[0]) is None
    cache = fixed_cache.fixed_cache(checkpoint("qwen3_moe")[0])
    keys = torch.randn(1, 2, 5, 16)
    cache.update(keys, keys, 0)
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.reserve(3000)
    assert cache.room == 4096 and torch.equal(cache.layers[0].keys[:, :, :5], keys)
    cache.update(keys, keys, 0)
    assert torch.equal(cache.layers[0].keys[:, :, :8], torch.cat([keys[:, :, :3], keys], 2))
    cache.crop(0)
    assert cache.get_seq_length() == 8
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop: found 2"):
        cache.crop(2)
