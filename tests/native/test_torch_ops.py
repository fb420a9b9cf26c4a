"""The C calls as operators of torch: graphs, shapes without values, profiles; and errors that stay named."""

import gc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ktransformers import native
from ktransformers.errors import NativeError
from tests.native.blocks import random_weight

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


def linear(rows=24, cols=64) -> native.Linear:
    return native.Linear(random_weight(np.random.default_rng(1), "Q8_0", rows, cols), name="blk.1")


def experts(count=3, hidden=64, inner=32) -> native.Experts:
    r = np.random.default_rng(2)
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return native.Experts(*([random_weight(r, "Q8_0", *s) for _ in range(count)] for s in sizes))


def call(tokens=5, hidden=64, count=3):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, count, (tokens, 2), generator=g)
    return torch.randn(tokens, hidden, generator=g), ids, torch.rand(tokens, 2, generator=g)


def routed() -> tuple[native.Router, native.Block]:
    made = native.Router(random_weight(np.random.default_rng(3), "F32", 3, 64), native.Choice(2))
    return made, native.Block(made, experts())


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.experts = linear(64, 64), experts()

    def forward(self, x, ids, weights):
        return self.experts(self.linear(x).relu(), ids, weights) + x


def test_the_operator_computes_what_the_call_does():
    one, all_of = linear(), experts()
    x, ids, weights = call()
    assert torch.equal(torch.ops.ktransformers.linear(x, one.number), one.compute(x))
    assert torch.equal(torch.ops.ktransformers.experts(x, ids, weights, all_of.number), all_of.compute(x, ids, weights))


@pytest.mark.parametrize("which", ["linear", "experts"])
def test_torch_finds_the_operators_sound(which):
    """torch's own test of an operator: its schema, its shapes without values, its place in traced graphs."""
    one, all_of = linear(), experts()
    arguments = (call()[0], one.number) if which == "linear" else (*call(), all_of.number)
    torch.library.opcheck(getattr(torch.ops.ktransformers, which).default, arguments)


@pytest.mark.parametrize("which", ["router", "moe"])
def test_router_and_block_are_operators_too(which):
    """What they compute, torch's own test, and shapes without values."""
    made = routed()[which == "moe"]
    operator, x = getattr(torch.ops.ktransformers, which).default, call()[0]
    both = zip(*((out,) if which == "moe" else out for out in (operator(x, made.number), made.compute(x))), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    torch.library.opcheck(operator, (x, made.number))
    out = made(x.to("meta"))
    assert [list(t.shape) for t in ([out] if which == "moe" else out)] == ([[5, 64]] if which == "moe" else [[5, 2], [5, 2], [5, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_and_meta_tensors_get_shapes(dtype):
    one, all_of = linear(), experts()
    x, ids, weights = call()
    mode, given = FakeTensorMode(), (x.to(dtype).unsqueeze(0), x.to(dtype), ids, weights)
    fake = [mode.from_tensor(t) for t in given]
    with mode:
        found = one(fake[0]), all_of(*fake[1:])
    assert [(f.shape, f.dtype, f.device.type) for f in found] == [
        ((1, 5, 24), dtype, "cpu"), ((5, 64), dtype, "cpu")
    ]  # fmt: skip
    meta = one(x.to("meta", dtype)), all_of(*(t.to("meta") for t in (x.to(dtype), ids, weights)))
    assert [(m.shape, m.dtype, m.is_meta) for m in meta] == [((5, 24), dtype, True), ((5, 64), dtype, True)]


def test_shapes_and_dtypes_that_do_not_fit_are_named_without_values_too():
    one, all_of = linear(), experts()
    with pytest.raises(NativeError, match=r"blk\.1: found input of torch.float32 \[2, 63\].*\[..., 64\]"):
        one(torch.zeros(2, 63, device="meta"))
    with pytest.raises(NativeError, match="torch.float64"):
        all_of(*(t.double().to("meta") for t in call()))


def test_compile_puts_each_call_into_one_graph():
    module, (x, ids, weights) = Both(), call()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x, ids, weights = call(tokens)
        assert torch.equal(compiled(x, ids, weights), module(x, ids, weights))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if "ktransformers" in str(node.target)]
    assert called == ["ktransformers.linear.default", "ktransformers.experts.default"]


def test_export_with_a_free_number_of_tokens():
    module = Both()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(module, call(), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
    for n in (5, 11):
        assert torch.equal(program.module()(*call(n)), module(*call(n)))


def test_a_profile_shows_the_calls():
    one = linear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one(call()[0])
    assert "ktransformers::linear" in {event.key for event in profile.key_averages()}


def test_a_number_whose_weights_are_gone_is_refused():
    one = linear()
    number = one.number
    del one
    gc.collect()
    with pytest.raises(NativeError, match=f"number {number}: found no weights"):
        torch.ops.ktransformers.linear(call()[0], number)
    assert linear().number > number
