"""Router, routed and shared experts in one call, against the three computed one by one in torch."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native import Choice
from ktransformers.operators.routing import Routing, packed
from tests.native.blocks import random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


class Case:
    """A block with random weights, in C and as numbers."""

    def __init__(self, fmt="F32", hidden=64, inner=32, shared=96, experts=9, k=3, gate=True, seed=0, dtype=torch.float32,
                 factor=1.0, shared_factor=1.0, down=None):  # fmt: skip
        r = np.random.default_rng(seed)
        g = torch.Generator().manual_seed(seed)
        shapes = ((inner, hidden, fmt), (inner, hidden, fmt), (hidden, inner, down or fmt))
        self.stacks = [[random_weight(r, kind, a, b) for _ in range(experts)] for a, b, kind in shapes]
        self.experts = native.Experts(*self.stacks, name="experts")
        self.routing = Routing(
            Choice(k, "sigmoid", divide="sum", factor=1.5), (torch.randn(experts, hidden, generator=g) / 8).to(dtype)
        )
        self.shared = self.gate = None
        if shared:
            self.one = [[random_weight(r, kind, a, b)] for a, b, kind in
                        ((shared, hidden, fmt), (shared, hidden, fmt), (hidden, shared, fmt))]  # fmt: skip
            self.shared = native.Experts(*self.one, name="shared")
            self.gate = (torch.randn(1, hidden, generator=g) / 4).to(dtype) if gate else None
        self.factor, self.shared_factor = factor, shared_factor
        self.block = native.Block(
            self.routing.in_c("gate"), self.experts, self.shared, None if self.gate is None else packed(self.gate),
            factor, shared_factor, name="mlp",
        )  # fmt: skip

    def numbers(self, x):
        """The block in float64, of dequantized weights."""
        x = x.double()
        _, weights, ids = self.routing.apply(x.float())
        out = torch.zeros_like(x)
        for t, (row, w) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            for e, scale in zip(row, w, strict=True):
                out[t] += self.factor * scale * mlp(x[t], *(stack[e] for stack in self.stacks))
        if self.shared is not None:
            part = self.shared_factor * mlp(x, *(stack[0] for stack in self.one))
            out += part if self.gate is None else part * torch.sigmoid(x @ self.gate.double().T)
        return out


def mlp(x, gate, up, down):
    gate, up, down = (values(w).double() for w in (gate, up, down))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def tokens(count, hidden=64, dtype=torch.float32, seed=5):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("shared", "gate"), [(0, False), (96, False), (96, True)])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 2.0)])
def test_a_block_is_the_sum_of_its_parts(shared, gate, count, factors):
    case = Case(shared=shared, gate=gate, factor=factors[0], shared_factor=factors[1])
    x = tokens(count)
    assert error(case.block.compute(x), case.numbers(x)) < 1e-5


@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_K", "Q6_K", "BF16", "F16", "MXFP4", "IQ4_XS"])
@pytest.mark.parametrize("count", [1, 6])
def test_packed_weights(fmt, count):
    case = Case(fmt, hidden=512, inner=256, shared=768)
    x = tokens(count, 512)
    assert error(case.block.compute(x), case.numbers(x)) < (1e-5 if fmt in ("BF16", "F16") else 0.02)


@pytest.mark.parametrize(
    ("hidden", "inner", "shared", "experts", "k"), [(1, 1, 1, 1, 1), (33, 17, 5, 7, 7), (130, 70, 200, 40, 8)]
)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_odd_sizes(hidden, inner, shared, experts, k, count):
    case = Case("F32", hidden, inner, shared, experts, k)
    x = tokens(count, hidden)
    got = case.block.compute(x)
    assert got.shape == x.shape
    assert not count or error(got, case.numbers(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_in_half_precision(dtype):
    case = Case("BF16", dtype=dtype)
    for count in (1, 5):
        x = tokens(count, dtype=dtype)
        assert error(case.block.compute(x), case.numbers(x.float())) < 1e-2


@pytest.mark.parametrize("isa", native.isas() if native.available() else [])
@pytest.mark.parametrize("fmt", ["Q4_K", "BF16"])
def test_threads_and_batches_change_no_bit(isa, fmt):
    """Any number of threads, several nodes among them; a token gets alone the bits that the experts call gives it."""
    case = Case(fmt, hidden=512, inner=256, shared=768, down="Q6_K" if fmt == "Q4_K" else "Q8_0")
    was, threads = native.isa(), native.threads()
    try:
        native.set_isa(isa)
        x = tokens(3, 512)
        ids, weights, _ = case.routing.in_c("gate").compute(x)
        results = []
        for count in (1, 2, 5):
            native.set_threads(count)
            alone = torch.cat([case.block.compute(row) for row in x.split(1)])
            experts = torch.cat(
                [case.experts.compute(*parts) for parts in zip(x.split(1), ids.split(1), weights.split(1), strict=True)]
            )
            results.append((alone, experts, case.block.compute(x), case.experts.compute(x, ids, weights)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
        native.set_panel_threshold(1000)  # several tokens by the kernels of one
        native.set_threads(2)
        alone, experts, *_ = results[0]
        assert torch.equal(case.experts.compute(x, ids, weights), experts)
        assert torch.equal(case.block.compute(x), alone)
    finally:
        native.set_panel_threshold(0)
        native.set_isa(was)
        native.set_threads(threads)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fmt", ["Q8_0", "F32"])
@pytest.mark.parametrize("count", [1, 4])
def test_what_is_no_number_stays_in_its_token(bad, fmt, count):
    case = Case(fmt)
    x = tokens(count)
    clean = case.block.compute(x)
    x[0, 7] = bad
    got = case.block.compute(x)
    assert not got[0].isfinite().any() and torch.equal(got[1:], clean[1:])


def test_a_token_whose_intermediates_overflow():
    """Finite input, infinite products: as in fp32."""
    case = Case("Q8_0")
    x = tokens(1) * 1e30
    got, alone = case.block.compute(x), torch.cat([x, tokens(1)])
    assert not got.isfinite().all()
    assert torch.equal(case.block.compute(alone)[0].isfinite(), got[0].isfinite())


def test_experts_of_several_formats():
    """Activations are prepared before anyone knows who is chosen."""
    r, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    kinds = ["Q8_0", "F32", "BF16", "Q4_0", "F16"]
    stacks = [[random_weight(r, kind, a, b) for kind in kinds] for a, b in ((32, 64), (32, 64), (64, 32))]
    routing = Routing(Choice(3, divide="sum"), torch.randn(5, 64, generator=g))
    block = native.Block(routing.in_c("gate"), native.Experts(*stacks))
    for seed in range(8):
        x = tokens(1, seed=seed)
        _, weights, ids = routing.apply(x)
        expected = sum(
            w * mlp(x[0].double(), *(stack[e] for stack in stacks))
            for e, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True)
        )
        assert error(block.compute(x)[0], expected) < 0.02


def test_parts_that_do_not_fit_are_refused():
    a, b = Case(), Case(hidden=96)
    with pytest.raises(NativeError, match=r"mlp: found hidden sizes 64 \(router\), 96 \(experts\)"):
        native.Block(a.routing.in_c("gate"), b.experts, name="mlp")
    with pytest.raises(NativeError, match=r"mlp \(shared\): found 9 experts"):
        native.Block(a.routing.in_c("gate"), a.experts, a.experts, name="mlp")
    with pytest.raises(NativeError, match="no shared experts"):
        native.Block(a.routing.in_c("gate"), a.experts, None, packed(a.gate), name="mlp")
    with pytest.raises(NativeError, match=r"shared gate\): found \[2, 64\]"):
        native.Block(a.routing.in_c("gate"), a.experts, a.shared, packed(torch.zeros(2, 64)), name="mlp")
    with pytest.raises(NativeError, match=r"expected \[T, 64\]"):
        a.block.compute(torch.zeros(2, 3, 64))


def test_scratch_memory_is_that_of_one_call():
    """Calls inside a call have memory of their own, whose size does not grow with use."""
    case = Case("Q8_0")
    sizes = set()
    for count, _ in itertools.product((40, 1, 7), range(2)):
        case.block.compute(tokens(count))
        sizes.add(native.scratch_bytes())
    assert len(sizes) == 1
