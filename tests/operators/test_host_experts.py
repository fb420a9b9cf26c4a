"""Experts on the CPU for tokens on a GPU, on a simulated one (tests/simulated_gpu.py): eager steps, graphs, and faults."""

import pytest
import torch

from ktransformers import native
from ktransformers.errors import DeviceError, NativeError
from ktransformers.operators.host_experts import HostExperts, host_of
from tests.native.test_native import call, experts
from tests.simulated_gpu import CaptureError, SimulatedStreams

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
SEEDS = range(5)


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
