"""Delta nets on the CPU: a new token in one native call, on states that stay where transformers keeps them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from ktransformers import native, optimize_and_load
from ktransformers.native import DeltaNet
from ktransformers.operators.delta_net import KGatedDeltaNet, delta_of
from ktransformers.operators.paged_cache import paged_cache
from tests import families
from tests.tiny import meta_model, random_ids, randomize, relative_error, save

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

TYPES = ("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text")
RULES = ("Default", "MoE")  # matrices of torch, and as they lie in the checkpoint


@pytest.fixture(scope="module", params=[(family, rules) for family in TYPES for rules in RULES], ids="-".join)
def pair(request, tmp_path_factory):
    """transformers' own model and ours, of the same random weights."""
    family, rules = request.param
    torch.manual_seed(0)
    reference = randomize(AutoModelForCausalLM.from_config(families.config_of(family)).eval())
    folder = save(reference, tmp_path_factory.mktemp(family))
    model = optimize_and_load(meta_model(families.config_of(family)), rules, folder,
                              devices={"cuda": "cpu"}, progress=False)  # fmt: skip
    return reference, model


@pytest.fixture
def calls(monkeypatch):
    """Sequences of each native step of a net, alone or within its layer."""
    counted = []
    original = DeltaNet.fill_kept

    def counting(self, state, call, batch, *kept):
        counted.append(batch)
        return original(self, state, call, batch, *kept)

    monkeypatch.setattr(DeltaNet, "fill_kept", counting)
    return counted


def nets(model):
    return [module for module in model.modules() if isinstance(module, KGatedDeltaNet)]


def steps(model, ids, cache, sizes, **more):
    """Logits of `ids` in pieces."""
    found, at = [], 0
    for size in sizes:
        found.append(model(ids[:, at : at + size], past_key_values=cache, **more).logits)
        at += size
    return torch.cat(found, 1)


@torch.no_grad()
def test_twenty_steps_give_transformers_logits(pair, calls):
    reference, model = pair
    ids = random_ids(2, 31)
    assert nets(model) and all(net.native is not None for net in nets(model))
    for cache in (DynamicCache(config=model.config), paged_cache(model) or DynamicCache(config=model.config)):
        calls.clear()
        expected = steps(reference, ids, DynamicCache(config=reference.config), [11] + [1] * 20)
        assert relative_error(steps(model, ids, cache, [11] + [1] * 20), expected) < 1e-4
        assert calls == [2] * (20 * len(nets(model)))


@torch.no_grad()
def test_prompts_in_between_and_back_to_transformers(pair, calls):
    """The states are those that transformers' code left and will find."""
    reference, model = pair
    ids, sizes = random_ids(2, 40), [1, 1, 7, 1, 1, 1, 5, 1, 20, 1, 1]
    expected = reference(ids).logits
    cache = DynamicCache(config=model.config)
    assert relative_error(steps(model, ids, cache, sizes), expected) < 1e-4
    assert len(calls) == 7 * len(nets(model))  # the very first token has no state before it
    more = random_ids(2, 6, seed=9)
    theirs, ours = (copy.deepcopy(cache) for _ in range(2))
    assert relative_error(steps(reference, more, theirs, [1, 4, 1]), steps(model, more, ours, [1, 4, 1])) < 1e-4
    for a, b in zip(theirs.layers, ours.layers, strict=True):
        if hasattr(a, "recurrent_states"):
            torch.testing.assert_close(a.recurrent_states[0], b.recurrent_states[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(a.conv_states[0], b.conv_states[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False},
                                 {"prefill_chunk_size": 4}])  # fmt: skip
def test_generate_gives_the_same_tokens(pair, calls, how):
    reference, model = pair
    ids = random_ids(1, 9).repeat(1, 2)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **how}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    assert bool(calls) == how.get("use_cache", True)


def test_left_padded_batches(pair, calls):
    reference, model = pair
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    assert calls


def net_and_cache(model, batch=2):
    """A delta net, a cache after a prompt, and hidden states of a token; all of it once more for transformers' code."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(batch, 6), past_key_values=cache)
    hidden = torch.randn(batch, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    return nets(model)[0], cache, hidden


def compare(net, cache, hidden, **more):
    """What a step gives, after holding it to what the family's own code gives."""
    other = copy.deepcopy(cache)
    out = net(hidden, cache_params=cache, **more)
    expected = net.orig_module.forward(hidden, cache_params=other, **more)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    return out


@torch.no_grad()
def test_falls_back_where_a_step_is_not_plain(pair, calls):
    _, model = pair
    net, cache, hidden = net_and_cache(model)
    compare(net, cache, hidden, use_cache=True, position_ids=torch.tensor([[6]]))
    assert len(calls) == 1
    compare(net, cache, hidden, attention_mask=torch.tensor([[1], [0]]))
    compare(net, cache, hidden.repeat(1, 2, 1))
    net.forward(hidden)  # without a cache
    net.forward(hidden, cache)
    with torch.enable_grad():
        compare(net, copy.deepcopy(cache), hidden.clone().requires_grad_())
    held = cache.layers[net.layer_idx]
    held.conv_states[0] = held.conv_states[0].transpose(1, 2).contiguous().transpose(1, 2)
    compare(net, cache, hidden)
    assert len(calls) == 1
    held.conv_states[0] = held.conv_states[0].contiguous()
    compare(net, cache, hidden)
    assert len(calls) == 2
    held.activate_past_recording()
    compare(net, cache, hidden)
    net.train()
    compare(net, net_and_cache(model)[1], hidden)
    net.eval()
    assert len(calls) == 2


@torch.no_grad()
def test_falls_back_under_hooks_and_adapters(pair):
    _, model = pair
    net, cache, hidden = net_and_cache(model)
    for name in ("out_proj", "norm"):
        seen = []
        hook = net._modules[name].register_forward_hook(lambda *given, seen=seen: seen.append(given))
        net(hidden, cache_params=cache)
        hook.remove()
        assert seen
    inner = net._modules["out_proj"]

    class Adapter(nn.Module):
        def forward(self, x):
            return inner(x) * 2

    plain = net(hidden, cache_params=copy.deepcopy(cache))
    net._modules["out_proj"] = Adapter()
    try:
        torch.testing.assert_close(net(hidden, cache_params=copy.deepcopy(cache)), plain * 2, rtol=1e-4, atol=1e-5)
    finally:
        net._modules["out_proj"] = inner


@torch.no_grad()
def test_what_was_written_since_is_seen(pair, calls):
    _, model = pair
    net, cache, hidden = net_and_cache(model)
    before = net.dt_bias.clone()
    net.dt_bias.add_(1.0)
    try:
        compare(net, cache, hidden)
        assert not calls
    finally:
        net.dt_bias.copy_(before)
        net._versions = net._version()


@torch.no_grad()
def test_a_static_cache(pair, calls):
    reference, model = pair
    ids = random_ids(2, 14)
    ours, theirs = (StaticCache(config=model.config, max_cache_len=20) for _ in range(2))
    found, expected = (steps(m, ids, c, [9] + [1] * 5) for m, c in ((model, ours), (reference, theirs)))
    assert relative_error(found, expected) < 1e-4 and calls


def test_code_that_computes_something_else_is_not_recognized(pair):
    _, model = pair
    net = nets(model)[0]
    family = type(net.orig_module)
    assert delta_of(net.orig_module) is not None

    class Louder(family):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 1.01

    other = copy.copy(net.orig_module)
    other.__class__ = Louder
    assert delta_of(other) is None
    other = copy.copy(net.orig_module)
    other.__dict__["_modules"] = {**net.orig_module._modules, "more": nn.Linear(2, 2)}
    assert delta_of(other) is None


def test_weights_go_and_come_back(pair):
    _, model = pair
    net = nets(model)[0]
    net.unload()
    assert net.native is None
    net.load()
    assert net.native is not None
