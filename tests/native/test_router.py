"""The router in C against its formula in torch: every parameter, odd sizes, ties, what is no number, threads."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native import Choice, router
from ktransformers.operators.routing import Routing, packed
from tests.native.blocks import random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

ROOT = Path(__file__).parents[2]

ALL = list(
    itertools.product(
        router.SCORES,
        router.BIAS_ON,
        router.WEIGH,
        ["none", "sum", "clamp"],
        [None, ("max", -math.inf), ("best2", 0.0)],
    )
)


def routing(choice: Choice, experts=24, hidden=40, dtype=torch.float32, seed=0, more=()) -> Routing:
    g = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(hidden if name == "norm" else experts, generator=g) * 0.3 for name in more}
    if choice.bias_on != "none":
        vectors["choice_bias"] = torch.randn(experts, generator=g) * 0.1
    weight = torch.randn(experts, hidden, generator=g) / hidden**0.5
    return Routing(choice, weight.to(dtype), **vectors)


def inputs(tokens, hidden=40, dtype=torch.float32, seed=1):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(r: Routing, x, tolerance=1e-5):
    ids, weights, logits = r.in_c("gate").compute(x)
    expected_logits, expected, expected_ids = r.apply(x)
    said = f"{r.choice}, x {x.dtype} {list(x.shape)}, weight {r.weight.dtype} {list(r.weight.shape)}"
    torch.testing.assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance, msg=lambda m: f"{said}\n{m}")
    assert torch.equal(ids, expected_ids), said
    torch.testing.assert_close(weights, expected, rtol=10 * tolerance, atol=tolerance, msg=lambda m: f"{said}\n{m}")


@pytest.mark.parametrize(("score", "bias_on", "weigh", "divide", "groups"), ALL)
def test_every_combination_of_parameters(score, bias_on, weigh, divide, groups):
    choice = Choice(5, score, bias_on, weigh, divide, divide_by=0.25, factor=2.5)
    if groups:
        choice = replace(choice, groups=4, groups_kept=2, group_by=groups[0], masked=groups[1])
    r = routing(choice)
    check(r, inputs(1))
    check(r, inputs(7))


@pytest.mark.parametrize("more", [("bias",), ("factors",), ("norm",), ("bias", "factors", "norm")])
@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_vectors_norm_and_cap(more, cap):
    r = routing(Choice(3, "sigmoid", cap=cap, norm_eps=1e-6, norm_factor=0.3), more=more)
    check(r, inputs(1))
    check(r, inputs(9))


@pytest.mark.parametrize(("experts", "hidden", "k"), [(1, 1, 1), (3, 7, 3), (17, 33, 17), (128, 96, 8), (300, 65, 22)])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 33])
def test_sizes_and_dtypes_of_the_weight(experts, hidden, k, weight, tokens):
    check(routing(Choice(k), experts, hidden, weight), inputs(tokens, hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [False, True])
def test_logits_are_rounded_where_the_model_rounds(dtype, rounds):
    """Ties among rounded logits go by ascending id; sums in another order may round to the neighbour, which is rare."""
    r = routing(Choice(4, "softmax", round=rounds), 64, 128, dtype, more=("norm", "bias"))
    x = inputs(50, 128, dtype)
    ids, weights, logits = r.in_c("gate").compute(x)
    expected, w, i = r.apply(x)
    assert (logits == logits.to(dtype).float()).all() == rounds
    torch.testing.assert_close(logits, expected, rtol=1e-2 if rounds else 1e-5, atol=1e-2 if rounds else 1e-5)
    same = (ids == i).all(-1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(weights[same], w[same], rtol=2e-2, atol=2e-3)


def test_equals_go_by_ascending_id():
    r = Routing(Choice(4, "softmax"), torch.zeros(9, 16))
    assert r.in_c("gate").compute(inputs(3, 16))[0].tolist() == [[0, 1, 2, 3]] * 3
    signed = Routing(Choice(2, "none"), torch.tensor([[-0.0], [0.0], [0.0]]))
    assert signed.in_c("gate").compute(torch.ones(1, 1))[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", router.SCORES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_what_is_no_number_gives_ids_in_range_and_spoils_only_its_token(bad, score, tokens):
    choice = Choice(5, score, "score", divide="sum", groups=4, groups_kept=2)
    r = routing(choice)
    x = inputs(tokens)
    clean = r.in_c("gate").compute(x)
    x[0, 3] = bad
    ids, weights, logits = r.in_c("gate").compute(x)
    assert ids.min() >= 0 and ids.max() < 24 and all(len(set(row)) == 5 for row in ids.tolist())
    expected = r.apply(x)[0]
    assert torch.equal(logits.isnan(), expected.isnan())
    for got, was in zip((ids, weights, logits), clean, strict=True):
        assert torch.equal(got[1:], was[1:])


def test_packed_weights_are_routers_too():
    w = random_weight(np.random.default_rng(3), "Q8_0", 32, 64)
    x = inputs(4, 64)
    x[2, 5] = math.inf
    made = native.Router(w, Choice(4, "sigmoid"), name="gate")
    for rows in (x, x[:1], x[2:3]):
        _, _, logits = made.compute(rows)
        expected = rows @ values(w).float().T
        finite = expected.isfinite()
        torch.testing.assert_close(logits[finite], expected[finite], rtol=0.03, atol=0.1)
        assert torch.equal(logits.isfinite(), finite)


@pytest.mark.parametrize("isa", native.isas() if native.available() else [])
def test_threads_and_instruction_sets(isa):
    """Bit-equal for any number of threads; portable C up to the order of sums."""
    was, threads = native.isa(), native.threads()
    try:
        native.set_isa(isa)
        for dtype in (torch.float32, torch.bfloat16):
            r = routing(Choice(6, "sigmoid", "score", divide="sum", groups=8, groups_kept=4), 96, 200, dtype)
            for tokens in (1, 3, 40):
                x = inputs(tokens, 200, dtype)
                native.set_threads(1)
                one = r.in_c("gate").compute(x)
                native.set_threads(3)
                assert all(map(torch.equal, one, r.in_c("gate").compute(x)))
                torch.testing.assert_close(one[2], r.apply(x)[0], rtol=1e-5, atol=1e-5)
    finally:
        native.set_isa(was)
        native.set_threads(threads)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 0}, "gate: "),
        ({"top_k": 25}, "gate: "),
        ({"groups": 5, "groups_kept": 1}, "gate: "),
        ({"groups": 4, "groups_kept": 5}, "gate: "),
        ({"groups": 24, "groups_kept": 9}, "gate: "),  # two of a group of one
        ({"groups": 4, "groups_kept": 1, "top_k": 7}, "gate: "),  # more than may be chosen
        ({"cap": math.nan}, "gate: unknown way"),
        ({"score": "softmx"}, r"gate \(score\): found 'softmx'.*did you mean.*expected one of none, softmax"),
        ({"bias_on": "score"}, "gate: "),  # without a bias
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(NativeError, match=f"(?i){said}"):
        native.Router(packed(torch.zeros(24, 8)), replace(Choice(2), **changes), name="gate")


def test_names_are_those_of_the_header():
    header = (ROOT / "native/include/kt_native.h").read_text()
    tables = {"SCORE": router.SCORES, "BIAS_ON": router.BIAS_ON, "GROUP": router.GROUP_BY, "WEIGH": router.WEIGH,
              "DIVIDE": router.DIVIDE}  # fmt: skip
    for prefix, names in tables.items():
        found = {name.lower(): int(n) for name, n in re.findall(rf"KT_{prefix}_(\w+) = (\d+)", header)}
        assert found == names
