"""A layer's step on a GPU in few launches, without one: as test_gpu_attention.py does it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ktransformers import native
from ktransformers.kernels import cache, context, gqa_decode, keep, mla_decode, norm, router, swiglu
from ktransformers.operators import gpu_layer, gpu_pages
from ktransformers.operators.layer import KDecoderLayer
from tests.operators.test_gpu_attention import (  # noqa: F401  fixtures
    ATTENTION,
    EXACT,
    LATENT,
    LAYER,
    assert_steps,
    attended,
    loaded,
    logits,
)
from tests.tiny import random_ids, relative_error

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
    assert_steps(reference, model, random_ids(2, 40), [37, 1, 2], plain=True)
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


@pytest.mark.parametrize("name, most", [("grouped", 10), ("latents", 14)])
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
        assert counted[-1] == ["norm_kernel", product, *attend, product, "norm_kernel", product, "glu_kernel", product,
                               "aten::add"]  # fmt: skip


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
