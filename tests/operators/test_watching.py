"""Whatever is changed in a loaded model is computed with: numbers of modules, and small tensors behind autograd's back."""

import pytest
import torch
from torch import nn

from ktransformers import native
from ktransformers.operators.watching import Numbers, Values, Watch
from tests.operators.test_native_step import made
from tests.tiny import random_ids, relative_error

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

TYPES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe", "llama4_text")
"""Plain, latents and groups, sinks and limits of experts, delta nets, factors of layers, parts one by one."""
NOT_READ = {"dropout", "attention_dropout", "router_jitter_noise", "jitter_noise", "router_aux_loss_coef", "p"}
"""Of training alone."""


@pytest.fixture(scope="module", params=TYPES)
def pair(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)


def settings_of(reference: nn.Module) -> list[tuple[str, str, object]]:
    """(module, attribute, another value) for each kind of module of the first two layers and around them."""
    found = []
    for name, module in reference.named_modules():
        if any(part.isdigit() and int(part) > 1 for part in name.split(".")):
            continue
        for key, value in vars(module).items():
            if isinstance(value, float) and key not in NOT_READ:
                found.append((name, key, value * 1.25 + 0.01))
            elif key in ("top_k", "norm_topk_prob"):
                found.append((name, key, not value if isinstance(value, bool) else value - 1))
    return found


@torch.no_grad()
def test_numbers_set_after_the_first_step_are_computed_with(pair):
    reference, model = pair
    ids, tried = random_ids(2, 12), 0
    plain = reference(ids).logits
    for name, key, value in settings_of(reference):
        pairs = [reference.get_submodule(name), model.get_submodule(name)]
        assert relative_error(model(ids).logits, plain) < 1e-4
        before = getattr(pairs[0], key)
        for module in pairs:
            setattr(module, key, value)
        expected = reference(ids).logits
        assert relative_error(model(ids).logits, expected) < 1e-4, f"{name}.{key} = {value}"
        tried += relative_error(expected, plain) > 1e-3
        for module in pairs:
            setattr(module, key, before)
    assert tried > 3 and relative_error(model(ids).logits, plain) < 1e-4


@torch.no_grad()
def test_writes_through_data_are_seen_by_the_next_prompt(pair):
    reference, model = pair
    ids = random_ids(2, 12)
    theirs = dict(reference.named_parameters()) | dict(reference.named_buffers())
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    small = [n for n in ours if n in theirs and ours[n].is_floating_point() and ours[n].dim() == 1]
    small = [n for n in small if "original_inv_freq" not in n]
    assert any("norm" in name for name in small)
    model(ids)
    for name in small:
        before = theirs[name].clone()
        for tensor in (theirs[name], ours[name]):
            tensor.data.mul_(1.7)
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4, name
        for tensor in (theirs[name], ours[name]):
            tensor.data.copy_(before)


@torch.no_grad()
def test_numbers_changed_between_tokens_change_the_next(pair):
    reference, model = pair
    ids = random_ids(1, 9)
    past = [each(ids[:, :-2], use_cache=True).past_key_values for each in (reference, model)]
    steps = []
    for i in (-2, -1):
        steps += [each(ids[:, i : ids.shape[1] + i + 1], past_key_values=cache).logits
                  for each, cache in zip((reference, model), past, strict=True)]  # fmt: skip
        for each in (reference, model):
            norm = next(m for n, m in each.named_modules() if n.endswith("layernorm"))
            name = next(n for n in ("variance_epsilon", "eps") if hasattr(norm, n))
            setattr(norm, name, 0.5)
    for expected, found in zip(steps[::2], steps[1::2], strict=True):
        assert relative_error(found, expected) < 1e-4


@torch.no_grad()
def test_a_dense_mlp_replaced_or_wrapped_in_part_is_computed(tmp_path_factory):
    reference, model = made("deepseek_v3", tmp_path_factory)
    ids = random_ids(1, 9)
    model(ids)
    for each in (reference, model):
        each.model.layers[0].mlp.act_fn = nn.Tanh()
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    for each in (reference, model):
        mlp = each.model.layers[0].mlp
        mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Tanh())
    assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_numbers_of_configs_and_of_what_an_operator_replaced_count():
    module = nn.LayerNorm(4)
    numbers = Numbers([module, None])
    assert numbers.unchanged()
    module.eps = 0.1
    assert not numbers.unchanged()
    del module.eps
    assert not Numbers([nn.LayerNorm(4)])._names == [] and not numbers.unchanged()


def test_values_see_what_nothing_counts():
    norm = nn.LayerNorm(4)
    values, watch = Values(norm.parameters()), Watch(norm)
    norm.weight.data[2] = 3
    assert not values.unchanged()
    assert watch.unchanged(1) and not watch.unchanged(2)
