"""The activation of a dense MLP in Triton's interpreter and by the reference, against torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import swiglu as s
from ktransformers.native import Glu
from tests.kernels.paged import assert_close

FORMULAS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu2": lambda x: F.relu(x) ** 2,
}  # fmt: skip


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("limit", [math.inf, 1.5])
def test_activations(name, limit):
    """Both halves of one product, as a fused linear leaves them, larger than a block and off it."""
    gate, up = (torch.randn(3, 2 * 1100) * 2).chunk(2, 1)
    expected = FORMULAS[name](gate.double().clamp(max=limit)) * up.double().clamp(-limit, limit)
    assert_close(s.glu(up, gate, Glu(name, limit=limit)), expected)
    assert_close(s.glu(up, None, Glu(name)), FORMULAS[name](up.double()))


def test_gpt_oss():
    gate, up = torch.randn(2, 40) * 4, torch.randn(2, 40) * 4
    g, u = gate.double().clamp(max=7), up.double().clamp(-7, 7)
    assert_close(s.glu(up, gate, Glu("swigluoai", 1.702, 7.0)), g * torch.sigmoid(1.702 * g) * (u + 1))


def test_in_place_and_no_allocation(monkeypatch):
    gate, up = torch.randn(2, 40), torch.randn(2, 40)
    expected = F.silu(gate) * up
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert s.glu(up, gate, out=gate) is gate
    assert_close(gate, expected)


def test_what_does_not_fit_is_refused():
    up = torch.zeros(2, 40)
    for args in ((up, up[:1]), (up.T, None), (up[0], None)):
        with pytest.raises(UnsupportedError, match=r"expected \[T, I\]"):
            s.glu(*args)
    with pytest.raises(UnsupportedError, match="biases belong to its linears"):
        s.glu(up, up, Glu(up_bias=torch.zeros(1, 40)))
    assert s.glu(up[:0], up[:0]).shape == (0, 40)
