"""Routers and blocks recognized by their results: what is recognized, what is returned, and when C is not asked."""

import pytest
import torch
from ktransformers.models.traits import TRAITS
from torch import nn
from transformers import AutoModelForCausalLM

from ktransformers import native, optimize_and_load
from ktransformers.operators import routing
from ktransformers.operators.combining import combined
from ktransformers.operators.gate import KMoEGate
from ktransformers.operators.moe import KMoEBlock
from tests import families
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

CPU = {"cuda": "cpu"}
IN_C = sorted(set(families.known_here()) - families.ROUTER_NOT_IN_C.keys())


def router_of(model_type, dtype=torch.float32, **more):
    """A family's router with random weights, not on meta, and the number of its hidden values."""
    config = families.config_of(model_type)
    for name, value in more.items():
        setattr(config, name, value)
    model = meta_model(config).to(dtype)
    names = [n for n, m in model.named_modules() if TRAITS["router"](m) and "Hash" not in type(m).__name__]
    router = routing.twin(model.get_submodule(names[-1]))
    return router, max(t.shape[-1] for t in routing.tensors_of(router).values() if t.dim() == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", IN_C)
def test_a_familys_router_in_c_returns_what_the_family_does(model_type, dtype):
    """On random weights of the family's own dtypes: logits, weights and ids, and their dtypes."""
    if (model_type, dtype) == ("inkling2_text", torch.bfloat16):
        pytest.skip("the family's own code multiplies float32 by bfloat16")
    router, hidden = router_of(model_type, dtype)
    x = torch.randn(40, hidden, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = routing.recognized(router, dtype)
    takes_bias = routing.ARGUMENT in found.roles.values()
    experts = routing.tensors_of(router)[found.roles["weight"]].shape[0]
    bias = [torch.randn(experts, generator=torch.Generator().manual_seed(6)) * 0.3] if takes_bias else []
    _, made = routing.RouterInC().of(router, dtype, *bias)
    with torch.no_grad():
        expected = router(x.unsqueeze(0) if found.flattens else x, *bias)
        got = found.returned(*made(x))
    assert [t.dtype for t in got] == [t.dtype for t in expected] and [t.shape for t in got] == [
        t.shape for t in expected
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    mine, theirs = (t[2].sort(-1) for t in (got, expected))
    same = (mine.values == theirs.values).all(-1)
    assert same.float().mean() >= (1.0 if dtype == torch.float32 else 0.9)
    weights = [t[1].gather(1, order.indices)[same] for t, order in ((got, mine), (expected, theirs))]
    torch.testing.assert_close(*weights, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("model_type", "more", "parameter"),
    [
        ("laguna", {"moe_router_logit_softcapping": 1.5}, {"cap": 1.5}),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, {"weigh": "sigmoid", "divide": "sum"}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, {"groups": 4, "group_by": "max"}),
        ("deepseek_v4", {"scoring_func": "sqrtsoftplus"}, {"score": "sqrtsoftplus"}),
        ("axk2", {}, {"masked": 0.0, "groups": 4, "groups_kept": 2}),
        ("lfm2_moe", {"norm_topk_prob": True}, {"divide_by": 1e-6}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"divide": "none"}),
    ],
)  # fmt: skip
def test_parameters_follow_the_config(model_type, more, parameter):
    router, _ = router_of(model_type, **more)
    choice = routing.recognized(router, torch.float32).choice
    assert {name: getattr(choice, name) for name in parameter} == parameter


@pytest.mark.parametrize("model_type", families.ROUTER_NOT_IN_C)
def test_other_routers_are_not_recognized(model_type):
    router, _ = router_of(model_type)
    assert routing.recognized(router, torch.float32) is None


class Twisted(nn.Module):
    """A router as many are, but for one thing."""

    def __init__(self, twist):
        super().__init__()
        self.top_k, self.twist = 2, twist
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, hidden):
        logits = nn.functional.linear(hidden, self.weight)
        logits = logits * logits.abs().sqrt() if self.twist == "logits" else logits
        scores = logits.softmax(-1)
        ids = (scores if self.twist != "ids" else -scores).topk(self.top_k, -1).indices
        weights = scores.gather(1, ids)
        return logits, weights.sqrt() if self.twist == "weights" else weights, ids


@pytest.mark.parametrize("twist", ["", "logits", "ids", "weights"])
def test_a_router_that_does_something_else_is_not_recognized(twist):
    assert (routing.recognized(Twisted(twist), torch.float32) is None) == bool(twist)


def loaded(model_type, tmp_path, rule="Default"):
    torch.manual_seed(0)
    config = families.config_of(model_type)
    truth = randomize(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    )
    model = optimize_and_load(meta_model(truth.config), rule, save(truth, tmp_path), devices=CPU, progress=False)
    return truth, model.eval()


def block_of(model):
    return next(m for m in model.modules() if isinstance(m, KMoEBlock))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_router_logits_are_recorded_as_without_us(model_type, tmp_path):
    """transformers records them by hooks on the router: then the block asks its router, and not C for all at once."""
    truth, model = loaded(model_type, tmp_path)
    ids = random_ids(1, 7)
    with torch.no_grad():
        before = model(ids).logits
        got, expected = (m(ids, output_router_logits=True).router_logits for m in (model, truth))
        assert len(got) == len(expected) and all(
            relative_error(a, b) < 1e-4 for a, b in zip(got, expected, strict=True)
        )
        torch.testing.assert_close(model(ids).logits, before)  # whose sums torch may order by where memory lies
    assert block_of(model).how() == "one C call"


def test_a_hook_on_a_part_sees_its_call(tmp_path):
    _, model = loaded("qwen2_moe", tmp_path)
    block, seen = block_of(model), []
    handle = block.shared_expert.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        model(random_ids(1, 3))
        assert seen == [(3, 64)]
        handle.remove()
        model(random_ids(1, 3))
    assert len(seen) == 1


def test_gradients_and_training_take_the_familys_code(tmp_path):
    _, model = loaded("qwen3_moe", tmp_path)
    block, x = block_of(model), torch.randn(1, 4, 64)
    assert block.in_one_call(x, {}) is None  # the router's own weights want one
    model.requires_grad_(False)
    assert block.in_one_call(x, {}) is not None
    assert block.in_one_call(x.clone().requires_grad_(), {}) is None
    model.requires_grad_(True)
    gate = next(m for m in model.modules() if isinstance(m, KMoEGate))
    logits, weights, _ = gate(x[0].clone().requires_grad_())
    weights.sum().backward()
    assert logits.requires_grad and gate.weight.grad is not None
    model.train()
    with torch.no_grad():
        assert block.in_one_call(x, {}) is None


def test_weights_that_change_are_seen(tmp_path):
    """In place, replaced, or moved: the result is that of the weights there are."""
    _, model = loaded("qwen3_moe", tmp_path)
    block, x = block_of(model), torch.randn(1, 4, 64)

    def expected():
        with torch.no_grad():
            return block.orig_module.forward(x)

    with torch.no_grad():
        assert relative_error(block(x), expected()) < 1e-5
        block.gate.weight.neg_()
        assert relative_error(block(x), expected()) < 1e-5
        block.gate.weight = nn.Parameter(torch.randn(8, 64))
        assert relative_error(block(x), expected()) < 1e-5
        block.gate.weight.data = torch.randn(8, 64)
        assert relative_error(block(x), expected()) < 1e-5


class OtherSum(nn.Module):
    """A block around a family's parts that adds up in its own way."""

    def __init__(self, block, way):
        super().__init__()
        self.gate, self.experts, self.way = block.gate, block.experts, way

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, 1)
        _, weights, ids = self.gate(x)
        if self.way == "other input":
            x = x * 2
        if self.way == "other weights":
            weights = weights.flip(0)
        out = self.experts(x, ids, weights).view(hidden_states.shape)
        return {"half": out * 0.5, "square": out * out, "residual": out + hidden_states}.get(self.way, out)


@pytest.mark.parametrize("way", ["plain", "half", "square", "residual", "other input", "other weights"])
def test_a_block_that_adds_up_otherwise_is_not_recognized(way):
    block = next(m for m in meta_model(families.config_of("qwen3_moe")).modules() if TRAITS["moe_block"](m))
    found = combined(OtherSum(block, way), torch.float32)
    assert (found is not None) == (way in ("plain", "half"))
    assert way != "half" or found.factor == 0.5


def test_one_token_and_many_give_the_same(tmp_path):
    _, model = loaded("qwen2_moe", tmp_path)
    block, x = block_of(model), torch.randn(1, 5, 64)
    with torch.no_grad():
        alone = torch.cat([block(x[:, i : i + 1]) for i in range(5)], 1)
        torch.testing.assert_close(block(x), alone, rtol=1e-5, atol=1e-6)
