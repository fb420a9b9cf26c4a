"""A layer's step on a GPU in few launches, without one: as test_gpu_attention.py does it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ktransformers import native, optimize_and_load
from ktransformers.kernels import cache, context, gqa_decode, keep, mla_decode, norm, router, swiglu
from ktransformers.operators import gpu_layer, gpu_ops, gpu_pages
from ktransformers.operators.gpu_router import gpu_router
from ktransformers.operators.layer import KDecoderLayer
from ktransformers.operators.routing import ARGUMENT
from tests.operators.test_gpu_attention import (  # noqa: F401  fixtures
    ATTENTION,
    EXACT,
    LATENT,
    LAYER,
    REST,
    assert_steps,
    attended,
    loaded,
    logits,
)
from tests.operators.test_routing import router_of
from tests.tiny import meta_model, random_ids, relative_error

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
DENSE = {"grouped": ("qwen3", ATTENTION, {}), "latents": ("deepseek_v3", LATENT, {"first_k_dense_replace": 3})}
MORE = {
    "norms after": ("olmo2", ATTENTION, {}),
    "norms around": ("gemma3_text", ATTENTION, {"sliding_window": 20}),
    "attention beside the MLP": ("cohere", ATTENTION, {}),
    "factors": ("granite", ATTENTION, {}),
    "gate and up in one": ("glm4", ATTENTION, {}),
    "experts": ("qwen3_moe", ATTENTION, {}),
    "a block that gives weights": ("gpt_oss", ATTENTION, {"sliding_window": 20}),
    "a block that gives rows": ("llama4_text", ATTENTION, {}),
    "shared experts": ("deepseek_v3", LATENT, {}),
}


@pytest.fixture
def stepped(monkeypatch):
    """What each call of a layer's steps gave."""
    calls, forward = [], gpu_layer.GpuSteps.forward
    monkeypatch.setattr(gpu_layer.GpuSteps, "forward", lambda self, *args: (
        calls.append(forward(self, *args)), calls[-1])[1])  # fmt: skip
    return calls


@pytest.mark.parametrize("name", [*DENSE, *MORE])
def test_steps(name, loaded, stepped):  # noqa: F811
    family, rule, overrides = {**DENSE, **MORE}[name]
    reference, model = loaded(family, LAYER, rule, **overrides)
    layers = [module for module in model.modules() if isinstance(module, KDecoderLayer)]
    assert_steps(reference, model, random_ids(2, 40), [37, 1, 2], plain=family != "llama4_text")
    done = [gave for gave in stepped if gave is not None]
    assert len(done) == 2 * len([one for one in layers if one.gpu_steps is not None]) > 0


class Launches(TorchDispatchMode):
    """Counts what torch launches; kernels count themselves."""

    NONE = ("empty", "view", "detach", "split", "expand", "alias", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        is_view = aliases and not any(a.is_write for a in aliases)
        name = func._schema.name
        if name.startswith("aten::") and not is_view and not any(each in name for each in self.NONE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, most", [("grouped", 9), ("latents", 13)])
def test_launches_of_a_layer(name, most, loaded, monkeypatch):  # noqa: F811
    """After the first, which makes slots for all. Attention counts once more than here where a context is cut."""
    family, rule, overrides = DENSE[name]
    _, model = loaded(family, LAYER, rule, **overrides)
    counted, launches = [], Launches()
    for module in (cache, context, gqa_decode, keep, mla_decode, norm, router, swiglu):
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda kernel, *args, _launch=launch: (
            launches.names.append(kernel.__name__), _launch(kernel, *args)))  # fmt: skip
    forward = gpu_layer.GpuSteps.forward

    def step(*args):
        launches.names.clear()
        with launches:
            out = forward(*args)
        counted.append(list(launches.names))
        return out

    monkeypatch.setattr(gpu_layer.GpuSteps, "forward", step)
    held = gpu_pages.gpu_pages(model, plain=True)
    ids = random_ids(1, 21)
    logits(model, ids[:, :20], held)
    counted.clear()
    logits(model, ids[:, 20:], held)
    assert len(counted) == model.config.num_hidden_layers and len(counted[-1]) == most, counted[-1]
    if name == "grouped":
        product, attend = "aten::linear", ["keep_kernel", "gqa_kernel"]
        assert counted[-1] == ["norm_kernel", product, *attend, product, "norm_kernel", product, "glu_kernel", "aten::addmm_"]


def test_joined_weights_are_one_matrix_until_one_is_another(loaded, stepped):  # noqa: F811
    family, rule, overrides = DENSE["grouped"]
    _, model = loaded(family, LAYER, rule, **overrides)
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    ids, changed = random_ids(1, 9), nn.Parameter(torch.randn_like(parts[1]), requires_grad=False)
    held = gpu_pages.gpu_pages(model)
    attention.k_proj.weight = changed
    logits(model, ids[:, :8], held)
    found = logits(model, ids[:, 8:], held)
    whole = model(input_ids=ids.to(model.device), use_cache=False).logits[:, 8:].cpu()
    assert relative_error(found, whole.detach()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "minimax_m2", "ernie4_5_moe"])
def test_routers_give_what_the_familys_do(family, dtype, interpreter, monkeypatch):
    chosen = []
    monkeypatch.setattr(router, "choose", lambda *args, _choose=router.choose: (chosen.append(1), _choose(*args))[1])
    own, hidden = router_of(family, dtype)
    x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = gpu_router(own, dtype)
    given = [torch.randn(len(own.weight), generator=torch.Generator().manual_seed(6))]
    given = given if ARGUMENT in found.found.roles.values() else []
    with torch.no_grad():
        expected, ours = own(x, *given), found.forward(own, x, *(given or [None]))
    assert chosen and [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in expected]
    order, theirs = ours[2].sort(-1), expected[2].sort(-1)
    assert torch.equal(order.values, theirs.values)
    pairs = ((ours[0], expected[0]), (ours[1].gather(1, order.indices), expected[1].gather(1, theirs.indices)))
    for one, other in pairs:
        assert relative_error(one, other) < (EXACT if dtype == torch.float32 else 1e-2)


def test_routers_and_norms_of_rule_files(checkpoint, interpreter, monkeypatch):
    """By the operators that rules name; with gradients, and of another type, the family's own code."""
    made = []
    for name in ("choose", "rms_norm"):
        call = getattr(gpu_ops, name)
        monkeypatch.setattr(gpu_ops, name, lambda *args, _name=name, _call=call: (made.append(_name), _call(*args))[1])
    reference, folder = checkpoint("qwen3_moe")
    rules = [{"match": {"trait": "router"}, "replace": {"class": "ktransformers.operators.gate.KMoEGate"}},
             {"match": {"trait": "norm"}, "replace": {"class": "ktransformers.operators.layernorm.RMSNorm"}}, *REST]  # fmt: skip
    model = optimize_and_load(meta_model(reference.config), rules, folder, default_device="cpu")
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert relative_error(model(input_ids=ids).logits, reference(input_ids=ids).logits) < EXACT
    layers = model.config.num_hidden_layers
    assert made.count("choose") == layers and made.count("rms_norm") == 4 * layers + 1
    made.clear()
    norm, x = model.model.norm, torch.randn(2, 64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm(torch.randn(2, 64).bfloat16()) is not None and not made
