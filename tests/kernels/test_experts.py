"""Routed experts in Triton's interpreter, against the reference and against plain torch on quants' own numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from ktransformers.errors import WeightError
from ktransformers.kernels import experts as e
from ktransformers.kernels import grouping
from ktransformers.kernels import words as w
from ktransformers.native.experts import Glu
from tests.kernels.test_gemv import assert_close
from tests.kernels.weights import random_weight

E, H, I = 4, 64, 96  # noqa: E741

TWICE = 3e-5
"""Two products one after the other, each as in test_gemv."""


def make(name="Q8_0", down="Q4_0", glu=Glu(), gated=True, separate=False, hidden=H, width=I):  # noqa: B008
    gate, up = ([random_weight(name, width, hidden, seed + i) for i in range(E)] for seed in (0, 10))
    down = w.from_experts([random_weight(down, hidden, width, 20 + i) for i in range(E)], "cpu")
    if not gated:
        return e.Experts((w.from_experts(up, "cpu"),), down, glu, gated=False)
    first = (w.from_experts(gate, "cpu"), w.from_experts(up, "cpu")) if separate else e.joined(gate, up, "cpu")
    return e.Experts(first, down, glu)


def routed(tokens, per_token, hidden=H, seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, E, (tokens, per_token), generator=rng)
    return torch.randn(tokens, hidden, generator=rng), ids, torch.rand(tokens, per_token, generator=rng)


@pytest.fixture(params=["few", "many"])
def way(request, interpreter, monkeypatch):
    """Both ways of computing, whatever the number of pairs."""
    monkeypatch.setattr(e, "PAIRS_BY_GEMV", 1 << 20 if request.param == "few" else 0)
    return request.param


def test_plain_torch_agrees():
    """The reference itself, on the numbers of quants."""
    experts = make(separate=True)
    x, ids, weights = routed(5, 2)
    number = lambda kind, role, seed, rows, cols: random_weight(kind, rows, cols, seed).dequantize()  # noqa: E731
    expected = torch.zeros(5, H)
    for t in range(5):
        for k in range(2):
            i = int(ids[t, k])
            gate, up = number("Q8_0", "gate", i, I, H) @ x[t], number("Q8_0", "up", 10 + i, I, H) @ x[t]
            expected[t] += weights[t, k] * (number("Q4_0", "down", 20 + i, H, I) @ (F.silu(gate) * up))
    assert_close(e.reference(experts, x, ids, weights), expected)
    assert_close(e.forward(experts, x, ids, weights), expected)  # off a GPU
    assert torch.equal(e.reference(make(), x, ids, weights), e.reference(experts, x, ids, weights))


@pytest.mark.parametrize("tokens, per_token", [(1, 1), (1, 4), (6, 3)])
def test_numbers_of_tokens(way, tokens, per_token):
    experts, args = make(), routed(tokens, per_token)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), TWICE)


@pytest.mark.parametrize("first, down", [("Q4_K", "Q6_K"), ("Q2_K", "MXFP4")])
def test_types(way, first, down):
    experts = make(first, down, hidden=256, width=256)
    args = routed(1, 1, 256)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), TWICE)


@pytest.mark.parametrize("ids, dtype", [
    ([[-1, -1], [0, 0], [3, -1]], torch.int64),  # nobody's, one named twice, a part
    ([[-1, -1]] * 3, torch.int64),
    ([[4, 99], [2, 4]], torch.int32),  # beyond the last
    ([[1, 1]] * 2, torch.int32),  # all others empty
])  # fmt: skip
def test_ids_of_any_kind(way, ids, dtype):
    """Skipped pairs are not read: buffers full of NaN leave no trace."""
    experts, (x, _, weights) = make(), routed(len(ids), 2)
    ids = torch.tensor(ids, dtype=dtype)
    workspace = torch.full((e.workspace_size(experts, len(ids), 2, x.dtype),), float("nan"))
    assert_close(e.forward(experts, x, ids, weights, workspace=workspace), e.reference(experts, x, ids, weights), TWICE)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh", "relu", "relu2", "swigluoai"])
def test_activations_limits_and_biases(way, activation):
    rng = torch.Generator().manual_seed(5)
    bias = lambda width: torch.randn(E, width, generator=rng)  # noqa: E731
    glu = Glu(activation, 1.702, 1.5, bias(I), bias(I), bias(H))
    experts, args = make(glu=glu), routed(2, 1)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), TWICE)


def test_without_a_gate(way):
    glu = Glu("relu2", up_bias=torch.randn(E, I, generator=torch.Generator().manual_seed(6)))
    experts, args = make(glu=glu, gated=False), routed(2, 1)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), TWICE)


def test_gate_and_up_of_different_types(way):
    gate = w.from_experts([random_weight("Q8_0", I, 512, i) for i in range(E)], "cpu")
    up = w.from_experts([random_weight("Q4_0", I, 512, i) for i in range(E)], "cpu")
    down = w.from_experts([random_weight("Q8_0", 512, I, i) for i in range(E)], "cpu")
    experts, args = e.Experts((gate, up), down, Glu()), routed(1, 2, 512)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), TWICE)


def test_it_allocates_nothing_and_takes_tokens_in_pieces(way, monkeypatch):
    monkeypatch.setattr(e, "PAIRS_AT_ONCE", 6)
    experts, (x, ids, weights) = make(), routed(7, 2)
    expected, out = e.reference(experts, x, ids, weights), torch.zeros(7, H)
    workspace = torch.full((e.workspace_size(experts, 7, 2, x.dtype),), float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert e.forward(experts, x, ids, weights, out, workspace) is out
    assert_close(out, expected, TWICE)


def test_no_tokens(interpreter):
    experts = make()
    assert e.forward(experts, torch.zeros(0, H), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, H)
    nobody = e.forward(experts, torch.ones(2, H), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0))
    assert torch.equal(nobody, torch.zeros(2, H))


@pytest.mark.parametrize("pairs", [1, 5, 70, 3000])
@pytest.mark.parametrize("rows", [16, 64])
def test_grouping(interpreter, pairs, rows):
    """The blocks are those of a plain sort, in order; the rest of the table is marked as nobody's."""
    ids = torch.randint(-1, 7, (pairs, 1), generator=torch.Generator().manual_seed(pairs))
    workspace = torch.full((grouping.size(pairs, 6, rows),), 12345, dtype=torch.int32)
    blocks = grouping.group(ids, 6, rows, 1, workspace)
    table = zip(blocks.expert.tolist(), blocks.start.tolist(), blocks.stop.tolist(), strict=True)
    made = [(expert, blocks.pairs[start:stop].tolist()) for expert, start, stop in table if expert >= 0]
    assert made == grouping.reference(ids, 6, rows)
    assert all(expert == -1 for expert in blocks.expert[len(made) :].tolist())


@pytest.mark.parametrize("pairs, experts, rows", [(8, 128, 16), (512, 128, 16), (4096, 8, 64), (100, 3, 16)])
def test_blocks_suffice_for_any_routing(pairs, experts, rows):
    """The worst routing: one pair to as many experts as there are, the others where blocks break."""
    counts = [1] * min(experts, pairs)
    counts[0] += pairs - sum(counts)
    assert sum(math.ceil(count / rows) for count in counts) <= grouping.max_blocks(pairs, experts, rows)


def test_what_does_not_fit_is_refused():
    experts, (x, ids, weights) = make(), routed(3, 2)
    for args in ((x[:, :32], ids, weights), (x, ids[:2], weights), (x, ids, weights[:, :1]), (x, ids.T, weights.T)):
        with pytest.raises(WeightError, match=r"expected \[T, 64\]"):
            e.forward(experts, *args)
    with pytest.raises(WeightError, match="do not fit each other"):
        e.Experts(experts.first, experts.down, Glu(), gated=False)
