"""Gradients of routed experts, with and without adapters, against torch's autograd in float64 on the weights' values."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native.backward import NO_TERM, backward_adapted, forward_adapted
from tests.native.blocks import FORMATS, random_weight, values
from tests.native.scaled_blocks import KINDS, random_scaled

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

ISAS = native.isas() if native.available() else []
E, K, T = 5, 3, 19


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_exact(False)
    native.set_threads(None)
    native.set_isa(ISAS[-1])


UNITS = {
    "silu": (F.silu, {}),
    "silu limit": (F.silu, {"limit": 0.7}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), {"limit": 1.5}),
    "relu": (F.relu, {}),
    "relu2": (lambda x: F.relu(x).square(), {}),
    "swigluoai": (lambda x: x * torch.sigmoid(1.702 * x), {"alpha": 1.702, "limit": 1.0}),
}


@dataclass
class Case:
    """Random experts, a call on them, and what torch makes of both."""

    name: str = "F32"
    hidden: int = 64
    inner: int = 96
    unit: str = "silu"
    gated: bool = True
    biased: bool = False
    rank: tuple[int, int] = (0, 0)
    tokens: int = T
    count: int = E
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
        sizes = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}
        packed, self.values = {}, {}
        for role, size in sizes.items():
            some = [self._weight(rng, size) for _ in range(self.count)]
            packed[role] = [w for w, _ in some]
            self.values[role] = [v for _, v in some]
        self.bias = {r: torch.randn(self.count, s[0], generator=g) for r, s in sizes.items()}
        bias = {f"{r}_bias": b for r, b in self.bias.items() if self.biased and (self.gated or r != "gate")}
        self.function, options = UNITS[self.unit]
        self.limit = options.get("limit", math.inf)
        glu = native.Glu(self.unit.split()[0], **options, **bias)
        self.experts = native.Experts(packed["gate"] if self.gated else None, packed["up"], packed["down"], glu)
        self.x = torch.randn(self.tokens, self.hidden, generator=g).to(self.dtype)
        self.ids = torch.randint(0, self.count - 1, (self.tokens, K), generator=g)  # the last expert has no token
        self.ids[0, 0], self.ids[min(2, self.tokens - 1)] = -1, 1  # skipped, and one expert three times
        self.weights = torch.randn(self.tokens, K, generator=g)
        self.d_out = torch.randn(self.tokens, self.hidden, generator=g).to(self.dtype)
        out = self.inner * (2 if self.gated else 1)
        self.terms = [NO_TERM if not r else
                      (torch.randn(self.count, r, i, generator=g) / i**0.5, torch.randn(self.count, o, r, generator=g), 0.6)
                      for r, i, o in ((self.rank[0], self.hidden, out), (self.rank[1], self.inner, self.hidden))]  # fmt: skip

    def _weight(self, rng, size):
        if self.name in KINDS:
            weight = random_scaled(rng, self.name, *size)
            return weight, weight.dequantize().double()
        weight = random_weight(rng, self.name, *size)
        return weight, values(weight)

    def _expert(self, e, x, terms):
        parts = [x @ self.values[r][e].T + (self.bias[r][e].double() if self.biased else 0)
                 for r in ("gate", "up") if self.gated or r == "up"]  # fmt: skip
        (a, b, s), (a_down, b_down, s_down) = terms
        if a is not None:
            parts = [p + more for p, more in zip(parts, (x @ a[e].T @ b[e].T * s).chunk(len(parts), -1), strict=True)]
        up = parts[-1].clamp(-self.limit, self.limit)
        m = self.function(up)
        if self.gated:
            m = self.function(parts[0].clamp(max=self.limit)) * (up + (1 if self.unit == "swigluoai" else 0))
        y = m @ self.values["down"][e].T + (self.bias["down"][e].double() if self.biased else 0)
        return y if a_down is None else y + m @ a_down[e].T @ b_down[e].T * s_down

    def expected(self):
        """The result, then the gradients in the order of `found`."""
        x, w, *factors = (
            None if t is None else t.double().requires_grad_()
            for t in (self.x, self.weights, *self.terms[0][:2], *self.terms[1][:2])
        )
        terms = [(*factors[:2], self.terms[0][2]), (*factors[2:], self.terms[1][2])]
        out = torch.zeros(self.tokens, self.hidden, dtype=torch.float64)
        for e in range(self.count):
            token, slot = (self.ids == e).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, self._expert(e, x[token], terms) * w[token, slot, None])
        leaves = [t for t in (x, w, *factors) if t is not None]
        return out.detach(), torch.autograd.grad(out, leaves, self.d_out.double())

    def found(self):
        return backward_adapted(self.experts, self.x, self.ids, self.weights, self.d_out, *self.terms)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(case, bound, what=""):
    for name, found, expected in zip(("x", "weights", "A", "B", "A", "B"), case.found(), case.expected()[1], strict=False):
        assert found.shape == expected.shape
        assert relative(found, expected) < bound, f"{name} {what}"


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("rank", [(0, 0), (5, 9)], ids=["frozen", "adapted"])
def test_units(unit, gated, rank):
    """Every unit, with biases that enter it, clamps that cut, an expert without tokens, skipped and repeated ids."""
    if unit == "swigluoai" and not gated:
        pytest.skip("needs a gate")
    case = Case(unit=unit, gated=gated, biased=True, rank=rank)
    for isa in ISAS:
        native.set_isa(isa)
        check(case, 3e-6, isa)


@pytest.mark.parametrize("name", [*FORMATS, *KINDS])
def test_exact(name):
    case = Case(name, hidden=512, inner=256)
    native.set_exact(True)
    for isa in ISAS:
        native.set_isa(isa)
        check(case, 1e-5, isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q6_K", "BF16", "F32", "FP8", "GPTQ_ORDER"])
def test_numerics(name, dtype):
    """Gate and up of int8 activations (0.6 % measured here), products of bf16 (0.3 %), or fp32; and the result's dtype."""
    case = Case(name, hidden=512, inner=256, rank=(4, 4), dtype=dtype)
    bound = {"F32": 3e-6, "BF16": 3e-6 if dtype == torch.float32 else 4e-3, "FP8": 4e-3, "GPTQ_ORDER": 4e-3}.get(name, 8e-3)
    for isa in ISAS:
        native.set_isa(isa)
        check(case, bound + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2), isa)


@pytest.mark.parametrize("size", [(64, 96), (21, 7), (300, 530)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 700])
def test_sizes(size, tokens):
    """Sizes that end anywhere, ranks above a tile and a block of rows, more tokens of an expert than a share has."""
    case = Case("F32", *size, tokens=tokens, count=3, rank=(17, 140))
    check(case, 1e-5)
    assert relative(forward_adapted(case.experts, case.x, case.ids, case.weights, *case.terms), case.expected()[0]) < 1e-5


@pytest.mark.parametrize("rank", [(4, 0), (0, 4), (8, 8)])
@pytest.mark.parametrize("gated", [True, False])
def test_forward(rank, gated):
    case = Case(gated=gated, biased=True, rank=rank, unit="silu limit")
    for isa in ISAS:
        native.set_isa(isa)
        found = forward_adapted(case.experts, case.x, case.ids, case.weights, *case.terms)
        assert relative(found, case.expected()[0]) < 3e-6, isa
        check(case, 3e-6, isa)


@pytest.mark.parametrize("name", ["Q4_K", "BF16", "Q8_0"])
def test_threads_change_no_bit(name):
    case = Case(name, hidden=512, inner=768, tokens=600, rank=(8, 8), dtype=torch.bfloat16)
    for isa in ISAS:
        native.set_isa(isa)
        native.set_threads(1)
        alone = [*case.found(), forward_adapted(case.experts, case.x, case.ids, case.weights, *case.terms)]
        for threads in (2, 3, 8):
            native.set_threads(threads)
            found = [*case.found(), forward_adapted(case.experts, case.x, case.ids, case.weights, *case.terms)]
            assert all(torch.equal(f, a) for f, a in zip(found, alone, strict=True)), f"{isa} {threads}"


def test_adapters_of_more_experts():
    """Of experts that compute nothing here (LongCat's are the input itself), after those that do: no gradient."""
    case = Case(rank=(4, 4))
    fewer = case.found()
    case.terms = [(torch.cat((a, a[:2])), torch.cat((b, b[:2])), s) for a, b, s in case.terms]
    for found, expected in zip(case.found(), fewer, strict=True):
        assert torch.equal(found[: len(expected)], expected) and not found[len(expected) :].any()


def test_adapters_of_nothing_change_nothing():
    """B of zeros, as PEFT begins: the result of the experts alone, and gradients for B."""
    case = Case("Q4_K", 512, 256, rank=(4, 4))
    plain = case.experts(case.x, case.ids, case.weights)
    case.terms = [(a, torch.zeros_like(b), s) for a, b, s in case.terms]
    assert torch.equal(forward_adapted(case.experts, case.x, case.ids, case.weights, *case.terms), plain)
    _, _, a, b, a_down, b_down = case.found()
    assert not a.any() and not a_down.any()
    assert b[:-1].any() and b_down[:-1].any() and not b[-1].any()


def test_an_infinite_gradient_stays_in_its_token():
    case = Case("Q4_K", 512, 256)
    alone = case.found()
    case.d_out[4, 7], case.x[9, 1] = float("inf"), float("nan")
    found = case.found()
    kept = [t for t in range(T) if t not in (4, 9)]
    assert all(torch.equal(f[kept], a[kept]) for f, a in zip(found, alone, strict=True))
    assert not found[0][[4, 9]].isfinite().any()


def test_refusals():
    case = Case(rank=(4, 0))
    a, _, scale = case.terms[0]
    with pytest.raises(NativeError, match=r"gate and up.*B.*\[5, 192, 5\].*\[5, 192, 4\]"):
        forward_adapted(case.experts, case.x, case.ids, case.weights, (a, torch.zeros(5, 192, 5), scale))
    with pytest.raises(NativeError, match="both or neither"):
        forward_adapted(case.experts, case.x, case.ids, case.weights, (a, None, scale))
    with pytest.raises(NativeError, match=r"\[3, 64\].*\[19, 64\]"):
        case.experts.backward(case.x, case.ids, case.weights, case.d_out[:3])
