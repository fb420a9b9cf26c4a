"""What lies between an expert's projections, against torch in float64: clamps, gpt-oss's gated unit, squared ReLU,
biases, experts without a gate. And the exact mode: every format in fp32 arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ktransformers import native
from ktransformers.errors import NativeError, UnsupportedError
from tests.native.blocks import FORMATS, random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

E, H, INNER, K = 4, 64, 96, 2


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_panel_threshold(0)
    native.set_isa(native.isas()[-1])
    native.set_exact(False)


class Case:
    """Random experts of one weight type, with what torch needs to compute the same."""

    def __init__(self, name: str = "F32", hidden: int = H, inner: int = INNER, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.packed = {role: [random_weight(rng, name, *size) for _ in range(E)] for role, size in sizes.items()}
        self.values = {role: [values(w) for w in some] for role, some in self.packed.items()}
        g = torch.Generator().manual_seed(seed)
        self.bias = {role: torch.randn(E, size[0], generator=g) for role, size in sizes.items()}
        self.x = 4 * torch.randn(13, hidden, generator=g)
        self.ids = torch.randint(0, E, (13, K), generator=g)
        self.scale = torch.randn(13, K, generator=g)

    def expected(self, unit, biased: bool) -> torch.Tensor:
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for t in range(len(self.x)):
            for e, s in zip(self.ids[t].tolist(), self.scale[t].double(), strict=True):
                b = {r: self.bias[r][e].double() if biased else 0.0 for r in self.bias}
                x = self.x[t].double()
                m = unit(self.values["gate"][e] @ x + b["gate"], self.values["up"][e] @ x + b["up"])
                out[t] += s * (self.values["down"][e] @ m + b["down"])
        return out

    def run(self, activation: str, biased: bool, gated: bool = True, **kwargs) -> torch.Tensor:
        some = {f"{r}_bias": b for r, b in self.bias.items() if gated or r != "gate"} if biased else {}
        gate = self.packed["gate"] if gated else None
        glu = native.Glu(activation, **some, **kwargs)
        experts = native.Experts(gate, self.packed["up"], self.packed["down"], glu)
        return experts(self.x, self.ids, self.scale)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().mean() / expected.abs().mean()).item()


def clamped(limit):
    return lambda gate, up: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def gpt_oss(gate, up, alpha=1.702, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


UNITS = {
    "silu": ({}, lambda g, u: F.silu(g) * u),
    "silu limit 2": ({"limit": 2.0}, clamped(2.0)),
    "swigluoai": ({"alpha": 1.702, "limit": 7.0}, gpt_oss),
    "swigluoai no limit": ({"alpha": 1.5}, lambda g, u: g * torch.sigmoid(1.5 * g) * (u + 1)),
    "relu2": ({}, lambda g, u: F.relu(g) ** 2 * u),
    "gelu": ({}, lambda g, u: F.gelu(g) * u),
}


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("unit", UNITS)
def test_units(unit, biased):
    """Every gated unit equals torch's, on every instruction set and both paths."""
    kwargs, reference = UNITS[unit]
    case = Case()
    expected = case.expected(reference, biased)
    for isa in native.isas():
        native.set_isa(isa)
        for threshold in (1, 1000):
            native.set_panel_threshold(threshold)
            found = case.run(unit.split()[0], biased, **kwargs)
            assert worst(found, expected) < 3e-6, f"{unit} {isa} {threshold}"


@pytest.mark.parametrize("activation", ["relu2", "gelu", "silu", "relu"])
def test_without_a_gate(activation):
    """Experts without a gate: down(act(up(x)))."""
    case = Case()
    function = {"relu2": lambda u: F.relu(u) ** 2, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}[activation]
    case.bias["gate"].zero_()
    expected = case.expected(lambda _, u: function(u), biased=True)
    assert worst(case.run(activation, biased=True, gated=False), expected) < 3e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_clamps_keep_nan(value):
    """A NaN or an infinity in the input reaches the output of its own token as in torch, and no other."""
    case = Case()
    case.x[3, 5] = value
    found = case.run("silu", biased=False, limit=2.0)
    expected = case.expected(clamped(2.0), biased=False)
    assert torch.equal(found[3].isnan(), expected[3].isnan())
    assert not found[torch.arange(13) != 3].isnan().any()


def test_refusals():
    """What does not fit is one error that says so."""
    case = Case()
    with pytest.raises(UnsupportedError, match="swigluo"):
        case.run("swigluo", biased=False)
    with pytest.raises(NativeError, match="activation"):
        case.run("swigluoai", biased=False, gated=False)
    with pytest.raises(NativeError, match="limit|activation"):
        case.run("silu", biased=False, limit=-1.0)
    case.bias["up"] = torch.zeros(E, INNER + 1)
    with pytest.raises(NativeError, match=r"up bias.*\[4, 97\].*\[4, 96\]"):
        case.run("silu", biased=True)


@pytest.mark.parametrize("name", FORMATS)
def test_exact_mode(name):
    """native.set_exact: no rounding of activations to int8 or bf16 on any instruction set or path."""
    case = Case(name, 512, 256)
    expected = case.expected(lambda g, u: F.silu(g) * u, biased=False)
    native.set_exact(True)
    for isa in native.isas():
        native.set_isa(isa)
        for threshold in (1, 1000):
            native.set_panel_threshold(threshold)
            assert worst(case.run("silu", biased=False), expected) < 1e-5, f"{name} {isa} {threshold}"
