"""Experts on the CPU for tokens on a GPU, on a simulated one (tests/simulated_gpu.py): eager steps, graphs, and faults."""

import pytest
import torch
from transformers import DynamicCache

from ktransformers import native, optimize_and_load
from ktransformers.engine import sampling
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import Sampling
from ktransformers.engine.step import Steps
from ktransformers.errors import DeviceError, NativeError
from ktransformers.machine.streams import registered
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.host_experts import HostExperts, host_of
from ktransformers.operators.moe import SparseMoEBlock
from tests.native.test_native import call, experts
from tests.simulated_gpu import CaptureError, SimulatedStreams
from tests.tiny import meta_model, random_ids

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
SEEDS = range(5)
DEEPSEEK = "transformers.models.deepseek_v3.modeling_deepseek_v3"


def step(layers, hidden, ids, weights, shared=None):
    """What a model does: a layer after the other, with something of its own beside each."""
    for layer in layers:
        started = layer.start(hidden, ids, weights)
        beside = hidden * 2.0 if shared is None else shared(hidden)
        hidden = started.end() + beside
    return hidden


def expected(all_experts, hidden, ids, weights):
    for one in all_experts:
        hidden = one(hidden, ids, weights) + hidden * 2.0
    return hidden


@pytest.mark.parametrize("seed", SEEDS)
def test_eager_steps_of_several_sizes(seed):
    streams, both = SimulatedStreams(seed), [experts(), experts()]
    layers = [HostExperts(one, streams) for one in both]
    for tokens in (1, 4, 1, 64, 2):
        hidden, ids, weights = call(tokens)
        with streams.running():
            out = step(layers, hidden, ids.int(), weights.double())
        streams.wait()
        host_of(streams).check()
        assert torch.equal(out, expected(both, hidden, ids, weights))
    assert not streams.freed_too_early


@pytest.mark.parametrize("seed", SEEDS)
def test_graphs_of_several_sizes_are_replayed_in_turn(seed):
    streams, both = SimulatedStreams(seed), [experts(), experts()]
    layers = [HostExperts(one, streams) for one in both]
    graphs = {}
    for tokens in (4, 2, 1):
        given = call(tokens)
        with streams.running():
            step(layers, *given)
        streams.wait()
        with streams.running(), streams.capture() as graph:
            out = step(layers, *given)
        graphs[tokens] = graph, given, out
    for scale, tokens in ((1.0, 1), (0.5, 4), (3.0, 2), (-1.0, 1), (2.0, 4)):
        graph, given, out = graphs[tokens]
        given[0].mul_(scale)
        given[1].copy_(given[1].flip(0))
        graph.replay()
        streams.wait()
        host_of(streams).check()
        assert torch.equal(out, expected(both, *given))


def test_tokens_that_no_expert_gets():
    streams, one = SimulatedStreams(), experts()
    hidden, ids, weights = call(3)
    ids[1] = -1
    with streams.running():
        out = HostExperts(one, streams).start(hidden, ids, weights).end()
    streams.wait()
    assert torch.equal(out, one(hidden, ids, weights)) and not out[1].any()


def test_a_failure_on_the_cpu_is_raised_by_the_next_step_and_names_the_layer():
    streams, one = SimulatedStreams(), experts()
    layer = HostExperts(one, streams)
    hidden, ids, weights = call(2)
    with streams.running():
        layer.start(hidden, ids, weights).end()
        streams.wait()
        layer._call(host_of(streams).pinned(2, 512, ids.shape[1], hidden.dtype))._keep[1].dtype = 7
        layer.start(hidden, ids, weights).end()
        streams.wait()
        with pytest.raises(NativeError, match=f"{one.name}.*activation dtype"):
            layer.start(hidden, ids, weights)


@pytest.fixture
def deepseek(checkpoint):
    """A model whose blocks compute part by part on the CPU, as they do on a GPU."""
    reference, folder = checkpoint("deepseek_v3")
    rules = [{"match": {"class": "torch.nn.Linear"}, "replace": {"class": "default"}},
             {"match": {"name": r"\.mlp$", "class": f"{DEEPSEEK}.DeepseekV3MoE"},
              "replace": {"class": "ktransformers.operators.experts.KDeepseekV3MoE"}},
             {"match": {"trait": "experts"}, "replace": {"class": "ktransformers.operators.experts.KTransformersExperts"}}]  # fmt: skip
    model = optimize_and_load(meta_model(reference.config), rules, folder, default_device="cpu")
    for module in model.modules():
        if isinstance(module, SparseMoEBlock):
            module.in_one_call = lambda *_: None
    return reference, model


def torch_cache(model):
    """As on a GPU: pages are of the CPU, where C reads them without asking a stream."""
    cache = PrefixCache()
    cache.cache = DynamicCache(config=model.config)
    return cache


def test_a_model_generates_the_same_tokens(deepseek, monkeypatch):
    reference, model = deepseek
    monkeypatch.setattr(sampling, "largest", lambda logits: int(logits.argmax()))  # as for logits on a GPU
    prompt = random_ids(1, 9)
    expected = reference.generate(prompt, max_new_tokens=8, do_sample=False)[0, 9:].tolist()
    for seed in SEEDS:
        with registered(torch.device("cpu"), SimulatedStreams(seed)) as streams, streams.running():
            answer = generate(model, prompt[0].tolist(), max_new_tokens=8, sampling=Sampling(), cache=torch_cache(model))
            assert list(answer) == expected
        assert not streams.freed_too_early and host_of(streams).queue._names


def test_a_failure_in_a_step_is_raised_before_its_logits_are_used(deepseek):
    _, model = deepseek
    ids = random_ids(1, 9)[0].tolist()
    with registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        steps = Steps(model, torch_cache(model))
        steps.prompt(ids, 8)
        broken = next(m for m in model.modules() if isinstance(m, KTransformersExperts)).active
        steps.next(5)
        for call in broken._hosts[streams]._calls.values():
            call._keep[1].dtype = 7
        with pytest.raises(NativeError, match=r"layers\.\d+\.mlp\.experts: activation dtype"):
            steps.next(6)
        assert steps.cache.ids == [*ids, 5] and steps.cache._torn


def test_what_a_graph_does_not_allow():
    streams = SimulatedStreams()
    layer = HostExperts(experts(), streams)
    given = call(3)
    with streams.running():
        with pytest.raises(DeviceError, match="first step of 3 tokens while a graph is captured"), streams.capture():
            layer.start(*given)
        layer.start(*given).end()
        streams.wait()
        with pytest.raises(CaptureError, match="not joined"), streams.capture():
            layer.start(*given)
        with pytest.raises(CaptureError, match="wait while capturing"), streams.capture():
            streams.wait()
        with pytest.raises(CaptureError, match="_local_scalar_dense"), streams.capture():
            layer.start(*given).end().sum().item()


def test_the_stand_in_sees_what_was_not_waited_for():
    """Else the tests above prove nothing: a result read without `end`'s join, and memory let go while a stream reads."""
    wrong = 0
    for seed in range(10):
        streams, one = SimulatedStreams(seed), experts()
        layer = HostExperts(one, streams)
        hidden, ids, weights = call(2)
        streams.join = lambda: None
        with streams.running():
            out = layer.start(hidden, ids, weights).end() + 1.0
        streams.wait()
        wrong += not torch.equal(out, one(hidden, ids, weights) + 1.0)
    assert wrong
    streams = SimulatedStreams()
    with streams.running():
        made = torch.ones(4) * 3.0
        with streams.aside():
            kept = made + 1.0
        del made
        streams.join()
    assert streams.freed_too_early == ["mul"] and (streams.wait(), kept.tolist())[1] == [4.0] * 4
