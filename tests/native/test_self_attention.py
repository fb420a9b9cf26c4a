"""An attention module in one call: projections, norms, positions, cache and attention, against the formula in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native.pages import Pages
from ktransformers.native.self_attention import GATE_BY, GATES, PAIRS, PARTS, Shape
from ktransformers.operators.attending import Attending
from tests.native.blocks import random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

HIDDEN = 96
PLAIN = Shape(heads=6, kv_heads=2, size=32, value_size=32, scale=0.2, eps=1e-6)


class Dense(nn.Module):
    """A linear layer of float64 numbers."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        out = x.double() @ self.weight.double().T
        return out if self.bias is None else out + self.bias.double()


class Case:
    """An attention with random weights, in C and as numbers."""

    def __init__(self, shape=PLAIN, fmt="F32", norms=False, biases=False, sinks=False, seed=0, value_norm=False):
        r, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        q_rows = shape.heads * shape.size * (2 if shape.gate == "in_q" else 1)
        rows = {"q": q_rows, "k": shape.kv_heads * shape.size, "v": shape.kv_heads * shape.value_size, "o": HIDDEN}
        if shape.gate in ("elements", "heads"):
            rows["g"] = shape.heads * (shape.value_size if shape.gate == "elements" else 1)
        self.shape, self.fmt = shape, fmt
        self.weights = {p: random_weight(r, fmt, n, shape.heads * shape.value_size if p == "o" else HIDDEN)
                        for p, n in rows.items()}  # fmt: skip
        self.biases = {p: torch.randn(n, generator=g) for p, n in rows.items()} if biases else {}
        widths = [shape.size * (n if shape.norm_whole else 1) for n in (shape.heads, shape.kv_heads)]
        self.norms = {p: torch.rand(n, generator=g) + 0.5 for p, n in zip("qk", widths, strict=True)} if norms else {}
        if value_norm:
            self.norms["v"] = torch.rand(shape.value_size, generator=g) + 0.5
        self.sinks = torch.randn(shape.heads, generator=g) if sinks else None
        self.made = native.Attention(self.weights, shape, self.biases, self.norms, self.sinks, name="attention")

    def numbers(self, hidden, positions, mask, factor=None):
        """What the module gives in float64; mask [1 or B, 1, S, S] is added to scores, factor [1 or B, S] of queries."""
        module = nn.Module()
        names = dict(zip("qkvog", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), strict=True))
        for part, weight in self.weights.items():
            setattr(module, names[part], Dense(values(weight), self.biases.get(part)))
        for part, weight in self.norms.items():
            setattr(module, f"{part}_norm", nn.Module())
            getattr(module, f"{part}_norm").weight = weight.double()
        module.sinks = None if self.sinks is None else self.sinks.double()
        shape = self.shape if self.shape.pairs != "none" else dataclasses.replace(self.shape, pairs="halves")
        formula = Attending(
            shape, self.shape.pairs != "none", ("q_norm", "k_norm") if "q" in self.norms else None,
            sinks=None if self.sinks is None else "sinks", gate="gate_proj",
            value_norm="v_norm" if "v" in self.norms else None,
        )  # fmt: skip
        return formula.apply(module, hidden.double(), tuple(p.double() for p in positions), mask.double(), factor)[0]

    def pages(self, kind="f32"):
        return Pages(kind, self.shape.kv_heads, self.shape.size, self.shape.value_size)


def positions_of(shape, batch, tokens, width=None, seed=3):
    half = (width or shape.size) // 2
    angles = torch.rand(batch, tokens, half, generator=torch.Generator().manual_seed(seed)) * 6
    if shape.angles != "once":
        angles = angles.repeat_interleave(2, -1) if shape.angles == "beside" else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def causal(tokens):
    return torch.full((1, 1, tokens, tokens), float("-inf")).triu(1)


def hidden_of(batch, tokens, seed=5):
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cut(positions, begin, end):
    return tuple(p[:, begin:end] for p in positions)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


KINDS = {
    "plain": {},
    "no positions": dict(pairs="none"),
    "neighbours": dict(pairs="neighbours"),
    "parted": dict(pairs="parted"),
    "angles once": dict(angles="once"),
    "angles beside": dict(angles="beside", pairs="neighbours"),
    "values times a factor": dict(value_factor=0.7),
    "softplus in q": dict(gate="in_q", gate_by="softplus"),
    "softplus by head": dict(gate="heads", gate_by="softplus"),
    "one head of keys": dict(kv_heads=1),
    "each its own": dict(kv_heads=6),
    "values of another size": dict(value_size=16),
    "clipped": dict(clip=0.7),
    "gate in q": dict(gate="in_q"),
    "gate by element": dict(gate="elements"),
    "gate by head": dict(gate="heads"),
    "odd sizes": dict(size=24, value_size=20),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [False, True])
def test_computes_the_formula(kind, extras):
    case = Case(dataclasses.replace(PLAIN, **KINDS[kind]), norms=extras, biases=extras, sinks=extras)
    hidden, positions = hidden_of(2, 7), positions_of(case.shape, 2, 7)
    out = case.made.forward(hidden, case.pages(), positions)
    assert error(out, case.numbers(hidden, positions, causal(7))) < 1e-5


@pytest.mark.parametrize("more", [dict(norm_whole=True), dict(norm_last=True)])
def test_norms_of_all_heads_and_after_positions(more):
    case = Case(dataclasses.replace(PLAIN, **more), norms=True)
    hidden, positions = hidden_of(2, 5), positions_of(case.shape, 2, 5)
    out = case.made.forward(hidden, case.pages(), positions)
    assert error(out, case.numbers(hidden, positions, causal(5))) < 1e-5


@pytest.mark.parametrize("more", [dict(), dict(value_size=20, value_factor=0.3), dict(norm_last=True)])
def test_norms_of_values_and_factors_of_queries(more):
    case = Case(dataclasses.replace(PLAIN, **more), norms=True, sinks=True, value_norm=True)
    hidden, positions = hidden_of(2, 7), positions_of(case.shape, 1, 7)
    for factor in (torch.rand(1, 7) + 0.5, torch.rand(2, 7) + 0.5):
        expected = case.numbers(hidden, tuple(p.expand(2, -1, -1) for p in positions), causal(7), factor.double())
        pages, found = case.pages(), []
        for begin, end in ((0, 5), (5, 6), (6, 7)):
            part = cut(positions, begin, end)
            found.append(case.made.forward(hidden[:, begin:end], pages, part, q_factor=factor[:, begin:end]))
        assert error(torch.cat(found, 1), expected) < 1e-5


@pytest.mark.parametrize("width", [8, 16])
def test_a_part_of_a_head_may_turn(width):
    case = Case()
    hidden, positions = hidden_of(1, 5), positions_of(case.shape, 1, 5, width)
    assert error(case.made.forward(hidden, case.pages(), positions), case.numbers(hidden, positions, causal(5))) < 1e-5


@pytest.mark.parametrize("steps", [(70,), (1,) * 70, (3, 64, 1, 2), (65, 5)])
def test_pieces_of_any_size_give_what_one_call_gives(steps):
    case, tokens = Case(norms=True), 70
    hidden, positions = hidden_of(2, tokens), positions_of(PLAIN, 1, tokens)
    pages, found, at = case.pages(), [], 0
    for count in steps:
        found.append(case.made.forward(hidden[:, at : at + count], pages, cut(positions, at, at + count)))
        at += count
    assert pages.lengths == [tokens, tokens]
    expected = case.numbers(hidden, tuple(p.expand(2, -1, -1) for p in positions), causal(tokens))
    assert error(torch.cat(found, 1), expected) < 1e-5


def test_more_tokens_than_a_piece_of_scratch_memory_holds():
    case = Case()
    hidden, positions = hidden_of(1, 1100), positions_of(PLAIN, 1, 1100)
    out = case.made.forward(hidden, case.pages(), positions)
    assert error(out, case.numbers(hidden, positions, causal(1100))) < 1e-5


def test_a_mask_hides_padding_and_rows_that_see_nothing_are_finite():
    case, tokens = Case(), 9
    hidden, positions = hidden_of(2, tokens), positions_of(PLAIN, 1, tokens)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[1, :, :, :4] = False
    out = case.made.forward(hidden, case.pages(), positions, seen)
    assert out.isfinite().all()
    alone = case.made.forward(hidden[1:, 4:], case.pages(), cut(positions, 4, tokens))
    torch.testing.assert_close(out[1:, 4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", ["F32", "BF16", "F16", "Q8_0", "Q4_0"])
def test_packed_weights_in_exact_arithmetic(fmt):
    case = Case(fmt=fmt, norms=True)
    hidden, positions = hidden_of(1, 6), positions_of(PLAIN, 1, 6)
    native.set_exact(True)
    try:
        out = case.made.forward(hidden, case.pages(), positions)
    finally:
        native.set_exact(False)
    assert error(out, case.numbers(hidden, positions, causal(6))) < 1e-4


@pytest.mark.parametrize(("kind", "limit"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_kinds_of_pages(kind, limit):
    case, tokens = Case(), 130
    hidden, positions = hidden_of(1, tokens), positions_of(PLAIN, 1, tokens)
    pages = case.pages(kind)
    found = [case.made.forward(hidden[:, :100], pages, cut(positions, 0, 100))]
    found += [case.made.forward(hidden[:, t : t + 1], pages, cut(positions, t, t + 1)) for t in range(100, tokens)]
    assert error(torch.cat(found, 1), case.numbers(hidden, positions, causal(tokens))) < limit


@pytest.mark.parametrize("isa", native.isas() if native.available() else [])
@pytest.mark.parametrize("fmt", ["F32", "Q8_0"])
def test_every_instruction_set(isa, fmt):
    case = Case(fmt=fmt, norms=True, sinks=True)
    hidden, positions = hidden_of(2, 20), positions_of(PLAIN, 2, 20)
    before = native.isa()
    results = []
    try:
        for name in ("portable", isa):
            native.set_isa(name)
            results.append(case.made.forward(hidden, case.pages(), positions))
    finally:
        native.set_isa(before)
    # One int8 code more or less where sums in another order round otherwise.
    assert error(results[1], results[0].double()) < (1e-5 if fmt == "F32" else 2e-3)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bits_do_not_depend_on_threads_or_on_other_sequences(tokens):
    case = Case(fmt="Q8_0", norms=True)
    hidden, positions = hidden_of(3, tokens), positions_of(PLAIN, 1, tokens)
    found = []
    try:
        for count in (1, 2, 3):
            native.set_threads(count)
            found.append(case.made.forward(hidden, case.pages(), positions))
    finally:
        native.set_threads(None)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("fmt", ["F32", "Q8_0"])
def test_nan_stays_in_its_sequence(fmt):
    case = Case(fmt=fmt)
    hidden, positions = hidden_of(2, 4), positions_of(PLAIN, 1, 4)
    clean = case.made.forward(hidden, case.pages(), positions)
    hidden[0, 2, 5] = float("nan")
    out = case.made.forward(hidden, case.pages(), positions)
    assert out[0, 2:].isnan().all() and torch.equal(out[1], clean[1])
    torch.testing.assert_close(out[0, :2], clean[0, :2], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said():
    case = Case()
    with pytest.raises(NativeError, match="found input of shape .*, expected last dimension 96"):
        case.made.forward(torch.zeros(1, 1, 95), case.pages())
    with pytest.raises(NativeError, match="found a mask"):
        case.made.forward(hidden_of(1, 2), case.pages(), None, torch.ones(1, 1, 2, 3, dtype=torch.bool))
    with pytest.raises(NativeError, match="found positions"):
        case.made.forward(hidden_of(1, 2), case.pages(), positions_of(PLAIN, 1, 3))
    with pytest.raises(NativeError, match="found factors"):
        case.made.forward(hidden_of(1, 2), case.pages(), q_factor=torch.ones(1, 3))
    pages = case.pages()
    case.made.forward(hidden_of(2, 1), pages, positions_of(PLAIN, 1, 1))
    with pytest.raises(NativeError, match="found 1 sequences, expected the 2"):
        case.made.forward(hidden_of(1, 1), pages, positions_of(PLAIN, 1, 1))
    with pytest.raises(NativeError, match="norm"):
        native.Attention(case.weights, PLAIN, norms={"q": torch.ones(3)})
    wrong = {**case.weights, "k": case.weights["q"]}
    with pytest.raises(NativeError, match="attention: a size is out of range"):
        native.Attention(wrong, PLAIN)


def test_names_are_the_headers():
    lib = native.library.loaded().lib
    assert [getattr(lib, f"KT_{name.upper()}") for name in PARTS] == list(range(5))
    for prefix, names in (("GATE", GATES), ("GATE", GATE_BY), ("PAIRS", PAIRS)):
        assert {name: getattr(lib, f"KT_{prefix}_{(name or 'none').upper()}") for name in names} == names
