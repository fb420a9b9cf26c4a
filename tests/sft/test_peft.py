"""Stock PEFT on models whose weights stay packed: the same tensors, losses and gradients as on transformers' own."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from safetensors.torch import load_file

from ktransformers import optimize_and_load
from ktransformers.errors import UnsupportedError
from ktransformers.operators import base_operator
from tests import families, tiny
from tests.tiny import meta_model, random_ids, relative_error, save, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BOTH = {"generate_device": "cpu", "prefill_device": "cpu"}
IDS = random_ids(2, 24)


def mine(config, folder, rules=""):
    """The model of a folder by packaged rules, all on the CPU; the config is taken before PEFT changes it."""
    rules = rules or DEFAULT_RULES.get(config.model_type, "Default")
    return optimize_and_load(meta_model(copy.deepcopy(config)), rules, folder, devices={"cuda": "cpu"}, progress=False)


def adapted(model, seed=7, **config):
    """`model` with random adapters, the same for any model that has the same names."""
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    torch.manual_seed(seed)
    for _, tensor in sorted(trained(model).items()):
        tensor.data.normal_(0, 0.1)
    return model


def trained(model):
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def step(model, ids=IDS):
    """Loss and gradients of one step, in training mode."""
    model.train()
    model.zero_grad()
    torch.manual_seed(11)  # phimoe shakes what its router sees
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in trained(model).items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def pair(checkpoint):
    """Call with a family: (transformers' model, the same folder by packaged rules)."""

    def make(family="qwen3_moe", rules=""):
        reference, folder = checkpoint(family)
        return copy.deepcopy(reference), mine(reference.config, folder, rules)

    return make


def assert_same_step(found, expected, ids=IDS, limit=1e-4):
    (loss, gradients), (loss_expected, expected) = step(found, ids), step(expected, ids)
    assert abs(loss - loss_expected) < 1e-5 * abs(loss_expected)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None and gradient.abs().max() > 1e-6:
            assert relative_error(gradients[name], gradient) < limit, name


REFUSED_BY_PEFT = {
    "deepseek_v4": "o_a_proj is a linear in groups, which PEFT takes for one",
    "llama4": "its router is an nn.Linear that returns a tuple", "llama4_text": "as llama4", "phimoe": "as llama4",
    "nemotron_h": "PEFT refuses out_proj of Mamba layers",
}  # fmt: skip
"""Families that PEFT's all-linear cannot train on transformers' own model either."""
NOT_IN_C = {"inkling2_text"}


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES, *families.FAMILIES} - NOT_IN_C))
def test_every_family_trains_as_transformers_does(family, exact, tmp_path):
    targets = "all-linear" if family not in REFUSED_BY_PEFT else ["q_proj", "q_b_proj", "o_proj", "down_proj"]
    truth = tiny_model(family)
    model = mine(truth.config, save(truth, tmp_path))
    truth = adapted(truth, target_modules=targets)
    try:
        logits(truth)
    except RuntimeError:
        pytest.skip(f"PEFT on transformers' own model: {REFUSED_BY_PEFT[family]}")
    model = adapted(model, target_modules=targets)
    # After a step weights differ by rounding, which scans over states multiply: granitemoehybrid's then differ by 1.4e-4.
    for ids, limit in ((IDS, 1e-4), (random_ids(1, 33, seed=2), 1e-3)):
        assert_same_step(model, truth, ids, limit)
        for one in (model, truth):
            torch.optim.SGD(trained(one).values(), lr=0.05).step()


LINEARS = ["q_proj", "o_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": EXPERTS[1:]},
        {"target_parameters": EXPERTS, "use_rslora": True, "rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "target_modules": LINEARS},
        {"target_modules": [*LINEARS, "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": LINEARS, "lora_dropout": 0.0, "bias": "none", "modules_to_save": ["input_layernorm"]},
    ],
    ids=["both", "first", "down", "patterns", "router", "old names", "norms"],
)
def test_every_way_to_name_targets(pair, exact, config):
    truth, model = pair()
    assert_same_step(adapted(model, **config), adapted(truth, **config))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "aria_text"])
def test_an_adapter_goes_to_stock_peft_and_back(pair, exact, family, tmp_path):
    truth, model = pair(family)
    model = adapted(model, target_parameters=EXPERTS, target_modules=LINEARS)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_A.weight" in name for name in names) and not any("0.default" in n for n in names)
    assert relative_error(logits(peft.PeftModel.from_pretrained(truth, tmp_path)), expected) < 1e-5
    _, fresh = pair(family)
    plain = logits(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert relative_error(logits(loaded), expected) < 1e-5 and relative_error(plain, expected) > 1e-3
    with loaded.disable_adapter():
        assert relative_error(logits(loaded), plain) < 1e-5
    assert loaded.unload() is fresh and relative_error(logits(fresh), plain) < 1e-5


def test_two_adapters_at_once_are_added(pair, exact):
    made = []
    for model in pair():
        model = adapted(model, target_parameters=EXPERTS)
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_parameters=EXPERTS))
        torch.manual_seed(3)
        for name, tensor in sorted(model.named_parameters()):
            if ".second." in name:
                tensor.data.normal_(0, 0.1)
        model.base_model.set_adapter(["default", "second"])
        made.append(model)
    assert relative_error(logits(made[1]), logits(made[0])) < 1e-5
    assert_same_step(made[1], made[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_no_gradient(pair, exact, reentrant):
    _, model = pair()
    model = adapted(model, target_parameters=EXPERTS, target_modules=LINEARS)
    _, expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, found = step(model)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-6, name


def test_under_bf16_autocast_losses_stay_near(pair):
    truth, model = pair()
    config = {"target_parameters": EXPERTS, "target_modules": LINEARS}
    expected, _ = step(adapted(truth, **config))
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(adapted(model, **config))
    assert abs(loss - expected) < 0.05 * expected
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_unfrozen_norms_router_and_head_get_their_gradients(pair, exact):
    truth, model = pair()
    wanted = ("norm", "mlp.gate.weight")
    for one in (truth, model):
        for name, tensor in one.named_parameters():
            tensor.requires_grad_(any(part in name for part in wanted))
    assert_same_step(model, truth)
    model.eval(), truth.eval()  # where blocks and attention are one call in C, unless gradients are asked for
    for one in (truth, model):
        one.zero_grad()
        one(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: tensor.grad for name, tensor in truth.named_parameters() if tensor.requires_grad}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            assert relative_error(tensor.grad, expected[name]) < 1e-4, name


def test_what_cannot_hold_an_adapter_says_so(pair):
    _, model = pair()
    model = adapted(model, target_parameters=EXPERTS)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts: .*kt merge"):
        model.merge_and_unload()


def test_dropout_is_that_of_linear_layers(pair):
    """PEFT refuses it on experts; ours have none, and say so."""
    truth, model = pair()
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted(truth, target_parameters=EXPERTS, lora_dropout=0.1)
    base_operator._told.clear()
    with pytest.warns(UserWarning, match=r"lora_dropout 0\.1: .* those of experts do not"):
        model = adapted(model, target_parameters=EXPERTS, target_modules=LINEARS, lora_dropout=0.1)
    assert any(isinstance(m, torch.nn.Dropout) for m in model.modules())
    model.add_adapter("second", peft.LoraConfig(target_parameters=EXPERTS, lora_dropout=0.2))


def test_skip_lora_leaves_experts_alone(checkpoint):
    reference, folder = checkpoint("qwen3_moe")
    kwargs = {**BOTH, "generate_op": "KSFTExpertsCPU", "backend": "AMXBF16_SFT_SkipLoRA"}
    rules = [{"match": {"trait": "experts"}, "replace": {"class": "ktransformers.operators.experts.KTransformersExperts", "kwargs": kwargs}}]
    model = optimize_and_load(meta_model(reference.config), rules, folder, default_device="cpu", progress=False)
    model = adapted(model, target_modules="all-linear")
    assert not any(".experts." in name for name in trained(model))
    assert all(gradient is not None for gradient in step(model)[1].values())


def test_nan_stays_visible(pair):
    _, model = pair()
    model = adapted(model, target_parameters=EXPERTS)
    next(t for name, t in trained(model).items() if "layers.1" in name).data[0, 0] = float("nan")
    loss, gradients = step(model)
    assert loss != loss and any(not g.isfinite().all() for g in gradients.values())


def test_an_adapter_that_changes_is_seen_without_gradients(pair):
    """Its factors are kept in the order that C reads: until the parameters are written to, replaced, or trained."""
    _, model = pair()
    model = adapted(model, target_parameters=EXPERTS)
    seen = [logits(model)]
    assert torch.equal(logits(model), seen[0])
    parameters = [m.lora_B["default"] for name, m in model.named_modules() if "lora_B" in dir(m) and name.endswith("experts")]
    with torch.no_grad():
        parameters[0].weight.mul_(3)
    seen.append(logits(model))
    parameters[0].weight = torch.nn.Parameter(parameters[0].weight.detach() * 2)
    seen.append(logits(model))
    step(model)
    torch.optim.SGD(trained(model).values(), lr=0.5).step()
    seen.append(logits(model))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_plain_models_are_left_to_peft(checkpoint):
    """The wrapper that our experts are met with is PEFT's own for all others."""
    reference, _ = checkpoint("qwen3_moe")
    before = adapted(copy.deepcopy(reference), target_parameters=EXPERTS)
    expected = logits(before)
    merged = before.merge_and_unload()
    assert relative_error(logits(merged), expected) < 1e-5
    warnings.resetwarnings()
