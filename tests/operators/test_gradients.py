"""Gradients of experts with adapters: torch's operator in float64 against finite differences, the C library against it."""

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from ktransformers import native
from ktransformers.operators.adapters import Adapters, Factors
from ktransformers.operators.experts import KTransformersExperts
from tests.native.blocks import random_weight, values
from tests.operators.test_gating import CPU, FAMILIES, FamilyWeights, family

in_c = pytest.mark.skipif(not native.available(), reason="C library not built")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu")
"""Those that no family of FAMILIES has, put into experts that gate with whatever they are given."""
COUNT, HIDDEN, INNER, TOKENS = 4, 32, 24, 9
LEAVES = ("hidden", "weights", "first A", "first B", "down A", "down B")
ROUTINGS = {
    "empty expert": torch.arange(2 * TOKENS).view(TOKENS, 2) % (COUNT - 1),
    "repeated": torch.arange(TOKENS).view(TOKENS, 1).repeat(1, 3) % COUNT,
    "all to one": torch.full((TOKENS, 1), 2),
    "skipped": torch.tensor([[0, -1], [COUNT, 3], [-7, 2**40], [1, 1], [-1, -1], [2, 0], [3, -1], [0, 3], [-1, 2]]),
    "all skipped": torch.full((TOKENS, 2), -1),
    "no slots": torch.empty(TOKENS, 0, dtype=torch.long),
    "no tokens": torch.empty(0, 2, dtype=torch.long),
}


@pytest.fixture(autouse=True)
def _restore():
    yield
    if native.available():
        native.set_exact(False)
        native.set_isa(native.isas()[-1])


def gates(*names):
    return pytest.mark.parametrize("gate", names)


def experts_of(gate, op, dtype=torch.float32):
    """Random experts that gate so, computed by `op`."""
    made, gating = family(gate if gate in FAMILIES else "qwen3_moe")
    if gate in ACTIVATIONS:
        made.act_fn = ACT2FN[gate]
    elif gating is None and op == "KExpertsCPU":
        pytest.skip("a gating that C does not have")
    state = {f"x.{name}": tensor for name, tensor in made.state_dict().items()}
    operator = KTransformersExperts("x", FamilyWeights(made, state), None, made, generate_op=op, **CPU)
    operator.load()
    if dtype == torch.float64:  # which no file has: of the same values
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            dense = getattr(operator.active, name)
            setattr(operator.active, name, None if dense is None else dense.double())
    return operator


def leaves(operator, tokens, slots, dtype=torch.float32):
    """Hidden states, routing weights, and the factors of two adapters of unlike ranks: random, and to be differentiated."""
    g = torch.Generator().manual_seed(4)
    first = INNER * (2 if getattr(operator.orig_module, "has_gate", True) else 1)
    shapes = ((tokens, HIDDEN), (tokens, slots), (COUNT, 2, HIDDEN), (COUNT, first, 2), (COUNT, 3, INNER), (COUNT, HIDDEN, 3))
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def compute(operator, ids, hidden, weights, a, b, a_down, b_down):
    first = None if a is None else Factors(a, b, 0.7)
    operator.adapters = Adapters(first, None if a_down is None else Factors(a_down, b_down, 1.3))
    return operator(hidden, ids, weights)


def gradients(operator, ids, given, without=()):
    """The result, and its gradients for those of `given` that want one; as if there were none at the places `without`."""
    out = compute(operator, ids, *(None if i in without else t for i, t in enumerate(given)))
    wanted = [t for i, t in enumerate(given) if t.requires_grad and i not in without]
    if not out.requires_grad:  # torch's operator computed nothing
        return out, [torch.zeros_like(t) for t in wanted]
    return out.detach(), torch.autograd.grad(out, wanted, random_like(out), materialize_grads=True)


def random_like(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)


def as_doubles(given):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in given]


def assert_same(found, expected, limit=1e-5):
    """Each tensor, its largest difference relative to the largest value."""
    for name, f, e in zip(("result", *LEAVES), (found[0], *found[1]), (expected[0], *expected[1]), strict=False):
        assert f.shape == e.shape, name
        assert (f.double() - e).abs().sum() == 0 or (f.double() - e).abs().max() < limit * e.abs().max(), name


@gates(*FAMILIES, *ACTIVATIONS)
@pytest.mark.parametrize("routing", ["empty expert", "repeated", "skipped"])
def test_of_the_torch_operator_are_finite_differences(gate, routing):
    operator, ids = experts_of(gate, "KExpertsTorch", torch.float64), ROUTINGS[routing]
    given = leaves(operator, *ids.shape, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: compute(operator, ids, *x), given, fast_mode=True)


@in_c
@gates(*FAMILIES, *ACTIVATIONS)
def test_of_c_are_those_of_torch(gate, exact):
    operator, truth = experts_of(gate, "KExpertsCPU"), experts_of(gate, "KExpertsTorch", torch.float64)
    ids = ROUTINGS["skipped"]
    given = leaves(operator, *ids.shape)
    assert_same(gradients(operator, ids, given), gradients(truth, ids, as_doubles(given)))


@in_c
@pytest.mark.parametrize("routing", ROUTINGS)
def test_of_every_routing(routing, exact):
    operator, truth = (experts_of("qwen3_moe", *how) for how in (("KExpertsCPU",), ("KExpertsTorch", torch.float64)))
    ids = ROUTINGS[routing]
    given = leaves(operator, *ids.shape)
    expected = gradients(truth, ids, as_doubles(given))
    for isa in native.isas():
        native.set_isa(isa)
        assert_same(gradients(operator, ids, given), expected)


@in_c
@pytest.mark.parametrize("without", [(), (2, 3), (4, 5), (2, 3, 4, 5)], ids=["both", "down", "first", "neither"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)], ids=["none", "hidden", "router", "hidden and router"])
def test_of_what_is_trained_alone(without, frozen, exact):
    """A frozen router, a first layer whose input wants none, one of two adapters or none: what is left is the same."""
    operator, truth = (experts_of("gpt_oss", *how) for how in (("KExpertsCPU",), ("KExpertsTorch", torch.float64)))
    ids = ROUTINGS["repeated"]
    given = leaves(operator, *ids.shape)
    for i in frozen:
        given[i].requires_grad_(False)
    if len(without) + len(frozen) < 6:
        assert_same(gradients(operator, ids, given, without), gradients(truth, ids, as_doubles(given), without))


@in_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_dtype_that_is_given(dtype, exact):
    """As autocast gives it, over factors that stay fp32: each gradient in its leaf's dtype, rounded once."""
    operator, truth = (experts_of("qwen3_moe", *how) for how in (("KExpertsCPU",), ("KExpertsTorch", torch.float64)))
    ids = ROUTINGS["skipped"]
    given = leaves(operator, *ids.shape)
    given[:2] = [t.detach().to(dtype).requires_grad_() for t in given[:2]]
    found = gradients(operator, ids, given)
    assert [t.dtype for t in (found[0], *found[1])] == [dtype, dtype, dtype, *[torch.float32] * 4]
    doubles = as_doubles(given)
    out = compute(truth, ids, *doubles)
    expected = torch.autograd.grad(out, doubles, random_like(found[0]).double())
    assert_same(found, (out.detach(), expected), torch.finfo(dtype).eps)


@in_c
@pytest.mark.parametrize("leaf", range(6), ids=LEAVES)
@gates("qwen3_moe", "gpt_oss", "nemotron_h", *ACTIVATIONS)
def test_nan_stays_visible(gate, leaf):
    """One in a leaf is in the result and in the gradients wherever torch has it, and in no other token or expert."""
    operator, truth = experts_of(gate, "KExpertsCPU"), experts_of(gate, "KExpertsTorch", torch.float64)
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 1], [1, 0]])
    given = leaves(operator, *ids.shape)
    with torch.no_grad():
        given[leaf][0, 1] = float("nan")
    of_token = leaf < 2
    apart = ([1, 2, 3, 4], [2, 3]) if of_token else ([2, 3], [1, 2, 3])  # tokens and experts
    out, expected = gradients(truth, ids, as_doubles(given))
    for isa in native.isas():
        native.set_isa(isa)
        found = gradients(operator, ids, given)
        for i, (f, e) in enumerate(zip((found[0], *found[1]), (out, *expected), strict=True)):
            assert f.isnan()[e.isnan()].all(), f"{i} {isa}"
            assert f[apart[i > 2]].isfinite().all(), f"{i} {isa}"
        assert found[0].isnan().any() and found[1][0].isnan().any()


SCALES = {"Q4_K": (144, 0), "Q6_K": (210, 208), "Q8_0": (34, 0), "F16": (2, 0), "BF16": (2, 0)}
"""Bytes of a block, and where in it a two-byte scale or weight is."""


@in_c
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("kind", SCALES)
def test_nan_in_a_packed_weight_stays_visible(kind, tokens):
    """In what it is multiplied with, and back again."""
    weight = random_weight(np.random.default_rng(1), kind, 40, 512)
    size, at = SCALES[kind]
    weight.data.view(40, -1, size)[3, 0, at : at + 2] = torch.tensor((0xFF, 0x7F), dtype=torch.uint8)
    bad = values(weight).isnan()
    assert bad.any() and not bad[:3].any()
    x, d_y = torch.randn(tokens, 512), torch.randn(tokens, 40)
    for exact in (False, True):
        native.set_exact(exact)
        for isa in native.isas():
            native.set_isa(isa)
            y, d_x = native.Linear(weight)(x), native.Linear(weight).backward(d_y)
            assert torch.equal(y.isnan(), bad.any(1).expand_as(y)), isa
            assert torch.equal(d_x.isnan(), bad.any(0).expand_as(d_x)), isa
