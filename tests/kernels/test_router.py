"""The router in Triton's interpreter and by the reference, against operators/routing.py's formula and the C library."""

import math
from dataclasses import replace

import pytest
import torch

from ktransformers import native
from ktransformers.errors import UnsupportedError
from ktransformers.kernels import router as r
from ktransformers.native import Choice
from ktransformers.operators.routing import Routing


@pytest.fixture(params=["kernel", "reference"])
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")


FAMILIES = {
    "Mixtral": (8, Choice(2, divide="sum")),
    "Qwen3-MoE": (128, Choice(8, divide="sum")),
    "DeepSeek-V2": (160, Choice(6, groups=8, groups_kept=3, group_by="max", masked=0.0, factor=16.0)),
    "DeepSeek-V3": (256, Choice(8, "sigmoid", "score", divide="sum", divide_by=1e-20, factor=2.5, groups=8, groups_kept=4)),
    "gpt-oss": (32, Choice(4, "none", weigh="softmax")),
    "sqrtsoftplus": (24, Choice(5, "sqrtsoftplus", "logit", "sigmoid", "clamp", 0.5, masked=0.0, groups=3, groups_kept=2)),
    "capped": (7, Choice(7, "softmax", cap=2.0)),
}


def inputs(experts, tokens=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=rng) for shape in ((tokens, experts), (experts,), (experts,))]


def check(logits, choice, bias, factors):
    ids, weights = r.choose(logits, choice, bias, factors)
    _, expected, expected_ids = Routing(choice, torch.eye(logits.shape[1]), choice_bias=bias, factors=factors).apply(logits)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(way, name):
    experts, choice = FAMILIES[name]
    logits, bias, factors = inputs(experts)
    logits[1] = 0  # all equal
    logits[2] *= 20
    logits[3] *= 1e-3
    check(logits, choice, bias * 0.1, factors.abs())
    check(logits, choice, bias * 0.1, None)


@pytest.mark.parametrize("score", r.SCORES)
@pytest.mark.parametrize("weigh, divide, group_by", [("score", "none", "max"), ("softmax", "sum", "best2"), ("sigmoid", "clamp", "max")])
def test_parameters(way, score, weigh, divide, group_by):
    logits, bias, factors = inputs(20, 3)
    for bias_on in r.BIAS_ON:
        choice = Choice(5, score, bias_on, weigh, divide, 0.25, 2.5, 4, 2, group_by, cap=3.0)
        check(logits, choice, bias * 0.2, factors)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3-MoE"])
def test_ties_and_what_is_no_number_go_as_in_c(way, name):
    """Equal keys by ascending id, also those that are masked; a NaN is above infinity. The product is by the identity."""
    if not native.available():
        pytest.skip("C library not built")
    experts, choice = FAMILIES[name]
    choice = replace(choice, score="none", bias_on="none")
    logits, _, _ = inputs(experts, 7)
    logits[0] = -logits[0].abs().round()  # many equal, among them -0
    logits[0, 1::2] += 0.0  # and 0
    logits[1, ::3], logits[1, 7] = math.inf, 3
    logits[2] = -math.inf
    logits[3, 2:5] = 9.0
    ids, weights = r.choose(logits, choice)
    rows = logits.clone().nan_to_num(0, 1e30, -1e30)  # what the product can carry: infinity times 0 is NaN
    c_ids, c_weights, _ = Routing(choice, torch.eye(experts)).in_c("gate").compute(rows)
    assert torch.equal(ids, c_ids)
    finite = [0, 3, 4, 5, 6]
    torch.testing.assert_close(weights[finite], c_weights[finite], rtol=2e-6, atol=1e-7, equal_nan=True)  # 0 / 0 in row 0
    logits[4, 11] = math.nan
    assert r.choose(logits, choice)[0][4, 0] == 11


def test_ids_of_both_types_and_no_allocation(way, monkeypatch):
    logits, _, _ = inputs(16)
    choice = Choice(3)
    expected = r.choose(logits, choice)
    ids, weights = torch.zeros(6, 3, dtype=torch.int32), torch.zeros(6, 3)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    made = r.choose(logits, choice, ids=ids, weights=weights)
    assert made[0] is ids and made[1] is weights
    assert torch.equal(ids, expected[0].int()) and torch.equal(weights, expected[1])


def test_half_logits_in_a_view(way):
    logits = torch.randn(4, 40).half()[:, 8:24]
    check(logits, Choice(4, divide="sum"), None, None)
    assert r.choose(logits[:0], Choice(4))[0].shape == (0, 4)


def test_what_does_not_fit_is_refused():
    logits, bias, _ = inputs(20)
    for choice, vector in (
        (Choice(21), None), (Choice(0), None), (Choice(2, "tanh"), None), (Choice(2, bias_on="score"), None), (Choice(2), bias[:5]),
        (Choice(2, groups=3, groups_kept=1), None), (Choice(6, groups=4, groups_kept=1), None), (Choice(2, cap=-1.0), None),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="Router: found logits"):
            r.choose(logits, choice, vector)
    with pytest.raises(UnsupportedError, match="expected int64 or int32"):
        r.choose(logits, Choice(2), ids=torch.zeros(6, 2))
