"""One step of a gated delta net in one call, against the formula in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native.delta_net import ORDERS, Shape
from ktransformers.native.library import loaded
from ktransformers.operators.delta_net import Delta
from tests.native.blocks import random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

HIDDEN = 96
PLAIN = Shape(key_heads=2, value_heads=4, key_size=32, value_size=48, width=4)
SHAPES = {
    "plain": {},
    "by head": dict(order="by_head"),
    "each its own": dict(key_heads=4),
    "each its own by head": dict(key_heads=4, order="by_head"),
    "one head of keys": dict(key_heads=1, order="by_head"),
    "odd sizes": dict(key_heads=3, value_heads=9, key_size=13, value_size=7),
    "odd sizes by head": dict(key_heads=3, value_heads=9, key_size=13, value_size=7, order="by_head"),
    "wide": dict(width=64, key_size=40),
    "without a past": dict(width=1),
    "the published sizes of a head": dict(key_heads=1, value_heads=2, key_size=128, value_size=128),
}


class Dense(nn.Module):
    """A linear layer of float64 numbers."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight.double(), None if bias is None else bias.double()

    def forward(self, x):
        return nn.functional.linear(x.double(), self.weight, self.bias)


class Case:
    """A delta net with random weights, in C and as numbers."""

    def __init__(self, shape=PLAIN, fmt="F32", biases=False, seed=0):
        r, self.random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        values_, heads = shape.value_heads * shape.value_size, shape.value_heads
        rows = {"qkv": shape.channels, "z": values_, "b": heads, "a": heads, "qkvz": shape.channels + values_,
                "ba": 2 * heads, "out": HIDDEN}  # fmt: skip
        self.shape = shape
        self.weights = {part: random_weight(r, fmt, rows[part], values_ if part == "out" else HIDDEN)
                        for part in (*ORDERS[shape.order], "out")}  # fmt: skip
        self.biases = {part: self.numbers(rows[part]) for part in self.weights} if biases else {}
        self.tensors = {
            "conv": self.numbers(shape.channels, shape.width), "rate": self.numbers(heads).exp(),
            "conv_bias": self.numbers(shape.channels) if biases else None, "dt_bias": self.numbers(heads),
            "norm": self.numbers(shape.value_size),
        }  # fmt: skip
        self.made = native.DeltaNet(self.weights, shape, self.tensors, self.biases)

    def numbers(self, *size):
        return torch.randn(size, generator=self.random)

    def hidden(self, batch, dtype=torch.float32):
        return self.numbers(batch, 1, HIDDEN).to(dtype)

    def kept(self, batch, dtype=torch.float32):
        conv, states = (self.numbers(*size) for size in self.shape.kept(batch))
        return conv.to(dtype), states

    def formula(self, hidden, conv, states):
        """What the step gives in float64."""
        module = nn.Module()
        for part, weight in self.weights.items():
            name = "out_proj" if part == "out" else f"in_proj_{part}"
            setattr(module, name, Dense(values(weight), self.biases.get(part)))
        t = {name: None if x is None else x.double() for name, x in self.tensors.items()}
        module.conv1d, module.norm = nn.Module(), nn.Module()
        module.conv1d.weight, module.conv1d.bias, module.norm.weight = t["conv"].unsqueeze(1), t["conv_bias"], t["norm"]
        module.A_log, module.dt_bias = t["rate"].log(), t["dt_bias"]
        return Delta(self.shape).apply(module, hidden.double(), conv.double(), states.double())


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("biases", [False, True])
def test_computes_the_formula(kind, biases):
    """Three steps, each from what the one before kept."""
    case = Case(dataclasses.replace(PLAIN, **SHAPES[kind]), biases=biases)
    kept = case.kept(3)
    wanted = kept
    for _ in range(3):
        hidden = case.hidden(3)
        out, *wanted = case.formula(hidden, *wanted)
        assert error(case.made.forward(hidden, *kept), out) < 1e-5
        assert error(kept[0], wanted[0]) < 1e-5 and error(kept[1], wanted[1]) < 1e-5


@pytest.mark.parametrize("fmt", ["F32", "BF16", "F16", "Q8_0", "Q4_0"])
def test_packed_weights_in_exact_arithmetic(fmt):
    case = Case(dataclasses.replace(PLAIN, value_size=32), fmt)
    hidden, kept = case.hidden(2), case.kept(2)
    expected = case.formula(hidden, *kept)
    native.set_exact(True)
    try:
        out = case.made.forward(hidden, *kept)
    finally:
        native.set_exact(False)
    assert all(error(*pair) < 1e-4 for pair in zip((out, *kept), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision(dtype):
    """The newest input of the convolution is seen as it is kept."""
    case = Case(fmt="BF16")
    hidden, kept = case.hidden(2, dtype), case.kept(2, dtype)
    expected = case.formula(hidden, *kept)
    out = case.made.forward(hidden, *kept)
    assert out.dtype == kept[0].dtype == dtype
    assert all(error(*pair) < 2e-2 for pair in zip((out, *kept), expected, strict=True))


@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_bits_on_any_number_of_threads(fmt, order):
    before, found = native.threads(), []
    try:
        for threads in (1, 2, 3):
            native.set_threads(threads)
            case = Case(dataclasses.replace(PLAIN, value_size=32, order=order), fmt)
            hidden, kept = case.hidden(5, torch.bfloat16), case.kept(5, torch.bfloat16)
            found.append((case.made.forward(hidden, *kept), *kept))
    finally:
        native.set_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_more_sequences_than_a_piece_holds():
    case = Case(dataclasses.replace(PLAIN, key_heads=1, value_heads=1, key_size=4, value_size=4))
    hidden, kept = case.hidden(1030), case.kept(1030)
    expected = case.formula(hidden, *kept)
    out = case.made.forward(hidden, *kept)
    assert all(error(*pair) < 1e-5 for pair in zip((out, *kept), expected, strict=True))
    assert case.made.forward(case.hidden(0), *case.kept(0)).shape == (0, 1, HIDDEN)


def test_a_sequence_with_an_infinity_leaves_the_others_alone():
    case = Case(dataclasses.replace(PLAIN, value_size=32), "Q8_0")
    hidden, kept = case.hidden(3), case.kept(3)
    again = hidden.clone(), *(x.clone() for x in kept)
    hidden[1, 0, 5] = float("inf")
    out, clean = case.made.forward(hidden, *kept), case.made.forward(*again)
    for found, expected in zip((out, *kept), (clean, *again[1:]), strict=True):
        assert torch.equal(found[::2], expected[::2])
    assert not out[1].isfinite().any()


WRONG = {
    "two tokens": lambda h, c, s: (h.repeat(1, 2, 1), c, s),
    "another hidden size": lambda h, c, s: (h[..., :-1], c, s),
    "integers": lambda h, c, s: (h.long(), c, s),
    "inputs of another batch": lambda h, c, s: (h, c[:1], s),
    "states of another batch": lambda h, c, s: (h, c, s[:1]),
    "too few inputs": lambda h, c, s: (h, c[..., 1:], s),
    "inputs that are not contiguous": lambda h, c, s: (h, c.transpose(1, 2).contiguous().transpose(1, 2), s),
    "states that are not contiguous": lambda h, c, s: (h, c, s.transpose(2, 3).contiguous().transpose(2, 3)),
    "inputs of float64": lambda h, c, s: (h, c.double(), s),
    "states of bfloat16": lambda h, c, s: (h, c, s.bfloat16()),
    "states elsewhere": lambda h, c, s: (h, c, s.to("meta")),
}


@pytest.mark.parametrize("what", WRONG)
def test_refuses_other_arguments_and_changes_nothing(what):
    case = Case()
    hidden, conv, states = case.hidden(2), *case.kept(2)
    given = WRONG[what](hidden, conv, states)
    before = conv.clone(), states.clone()
    with pytest.raises(NativeError, match=r"delta net: found .*expected"):
        case.made.forward(*given)
    assert torch.equal(conv, before[0]) and torch.equal(states, before[1])


@pytest.mark.parametrize("change", [
    dict(key_heads=3), dict(key_heads=0), dict(value_heads=8), dict(key_size=16), dict(value_size=24), dict(width=65),
    dict(width=0), dict(order="by_head"), dict(order="mixed"), dict(key_size=2**40), dict(value_heads=-4),
])  # fmt: skip
def test_refuses_shapes_that_do_not_fit(change):
    case, shape = Case(), dataclasses.replace(PLAIN, **change)
    tensors = dict(case.tensors)
    if all(isinstance(n, int) and 0 < n < 1000 for n in (shape.channels, shape.value_heads, shape.width)):
        tensors |= {"conv": torch.zeros(shape.channels, shape.width), "rate": torch.zeros(shape.value_heads),
                    "dt_bias": torch.zeros(shape.value_heads), "norm": torch.zeros(shape.value_size)}  # fmt: skip
    with pytest.raises(NativeError):
        native.DeltaNet(case.weights, shape, tensors)


@pytest.mark.parametrize("part", ["conv", "rate", "dt_bias", "norm"])
def test_refuses_tensors_that_do_not_fit(part):
    case = Case()
    for wrong in (None, case.tensors[part][:-1], case.tensors[part].long()):
        with pytest.raises(NativeError, match=rf"delta net \({part}\): found .*expected float"):
            native.DeltaNet(case.weights, PLAIN, {**case.tensors, part: wrong})
    with pytest.raises(NativeError, match="found no matrix out"):
        native.DeltaNet({n: w for n, w in case.weights.items() if n != "out"}, PLAIN, case.tensors)


def test_names_are_the_headers():
    lib = loaded().lib
    assert [getattr(lib, f"KT_DELTA_{name.upper()}") for name in ORDERS] == list(range(len(ORDERS)))
