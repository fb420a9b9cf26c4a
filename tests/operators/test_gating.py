"""Ways of gating: each family's own code is recognized by its results, and the torch operator computes all of them."""

import math

import pytest
import torch
from ktransformers.models.traits import is_interleaved
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

from ktransformers.loaders import ExpertWeights
from ktransformers.operators.experts import KExpertsCPU, KTransformersExperts
from ktransformers.operators.gating import Gating, gating_of
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from tests.dict_weights import DictWeights

CPU = {"generate_device": "cpu", "prefill_device": "cpu"}
SIZES = dict(hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_local_experts=4, n_routed_experts=4,
             num_experts=4, num_hidden_layers=2, vocab_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip

FAMILIES = {
    # model type: (module, class, more of the config, the gating it has)
    "qwen3_moe": ("Qwen3MoeExperts", {}, Gating("silu")),
    "gpt_oss": ("GptOssExperts", {}, Gating("swigluoai", alpha=1.702, limit=7.0)),
    "deepseek_v4": ("DeepseekV4Experts", {"swiglu_limit": 10.0}, Gating("silu", limit=10.0)),
    "hy_v4": ("HYV4Experts", {"swiglu_limit": 7.0}, Gating("silu", limit=7.0)),
    "minimax_m3_vl_text": ("MiniMaxM3VLExperts", {}, Gating("swigluoai", alpha=1.702, limit=7.0)),
    "nemotron_h": ("NemotronHExperts", {"mlp_hidden_act": "relu2", "moe_latent_size": None}, Gating("relu2", has_gate=False)),
    "step3p5": ("Step3p7Experts", {}, None),  # clamps after the activation
}  # fmt: skip


def family(model_type: str):
    """(the family's experts with random weights, the gating it should have)."""
    name, more, gating = FAMILIES[model_type]
    try:
        config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    except (ValueError, TypeError):
        pytest.skip(f"this transformers has no {model_type}")
    config._experts_implementation = "eager"
    package = {"step3p5": "step3p7"}.get(model_type, model_type.removesuffix("_text"))
    module = __import__(f"transformers.models.{package}.modeling_{package}", fromlist=[name])
    arguments = {"swiglu_limit": 7.0} if model_type == "step3p5" else {}
    torch.manual_seed(0)
    made = getattr(module, name)(config, **arguments)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 1.5)  # so that limits matter
    return made, gating


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_gating_is_recognized(model_type):
    made, gating = family(model_type)
    assert gating_of(made) == gating


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_torch_operator_equals_the_family(model_type):
    made, _ = family(model_type)
    weights = DictWeights({f"x.{name}": tensor for name, tensor in made.state_dict().items()})
    assert KTransformersExperts.check("x", made, {**CPU, "generate_op": "KExpertsTorch"}, weights) == []
    operator = KTransformersExperts("x", weights, None, made.to("meta"), generate_op="KExpertsTorch", **CPU)
    operator.load()
    truth, _ = family(model_type)
    hidden, ids, w = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(operator(hidden, ids, w), truth(hidden, ids, w), rtol=2e-5, atol=2e-4)
    operator.unload()
    assert operator.active.gate_up_bias is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_c_library_equals_the_family(model_type):
    """Those that `Gating` knows; an unknown one is refused with the operator that has it."""
    made, gating = family(model_type)
    if gating is None:
        assert "does not compute their own gating (_apply_gate); use KExpertsTorch" in KExpertsCPU.problem(
            "x", made, None
        )
        return
    assert KExpertsCPU.problem("x", made, None) == ""
    state = {f"x.{name}": tensor for name, tensor in made.state_dict().items()}
    operator = KTransformersExperts("x", FamilyWeights(made, state), None, made, generate_op="KExpertsCPU", **CPU)
    operator.load()
    hidden, ids, w = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(operator(hidden, ids, w), made(hidden, ids, w), rtol=2e-5, atol=5e-4)


class FamilyWeights(DictWeights):
    """A family's own parameters as packed rows, whatever way it holds them."""

    def __init__(self, module: nn.Module, tensors: dict):
        super().__init__(tensors)
        self.module = module

    def experts(self, prefix):
        module = self.module
        first, down = getattr(module, "gate_up_proj", None), module.down_proj.detach()
        if first is None:
            return ExpertWeights(None, matrices(module.up_proj.detach()), matrices(down))
        first = first.detach()
        if getattr(module, "is_transposed", False):
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        halves = (first[:, 0::2], first[:, 1::2]) if is_interleaved(module) else first.chunk(2, dim=1)
        biases = ()
        if getattr(module, "has_bias", False):
            bias = module.gate_up_proj_bias.detach()
            biases = (bias[:, 0::2], bias[:, 1::2], module.down_proj_bias.detach())
        return ExpertWeights(*map(matrices, halves), matrices(down), *biases)


def matrices(stack):
    return [Packed(m.contiguous().view(-1).view(torch.uint8), QUANT_TYPES["F32"], tuple(m.shape)) for m in stack]


@pytest.mark.parametrize("odd", ["quick_gelu", "gelu_new"])
def test_an_activation_that_c_lacks_is_named(odd):
    made, _ = family("qwen3_moe")
    made.act_fn = ACT2FN[odd]
    assert f"does not compute the activation {odd!r}; use KExpertsTorch" in KExpertsCPU.problem("x", made, None)


def test_formulas():
    """The formulas in numbers, at and around the limits."""
    gate, up = torch.tensor([-9.0, 6.5, 8.0, 1.0]), torch.tensor([2.0, -8.0, 9.0, 0.5])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    oai = [(2 + 1) * -9 * sigmoid(-9 * 1.702), (-7 + 1) * 6.5 * sigmoid(6.5 * 1.702), (7 + 1) * 7 * sigmoid(7 * 1.702),
           1.5 * sigmoid(1.702)]  # fmt: skip
    torch.testing.assert_close(Gating("swigluoai", 1.702, 7.0).apply(gate, up), torch.tensor(oai))
    silu = [-9 * sigmoid(-9) * 2, 6.5 * sigmoid(6.5) * -7, 7 * sigmoid(7) * 7, sigmoid(1) * 0.5]
    torch.testing.assert_close(Gating("silu", limit=7.0).apply(gate, up), torch.tensor(silu))
    assert Gating("relu2", has_gate=False).apply(None, up).tolist() == [4.0, 0.0, 81.0, 0.25]
    assert Gating("silu").apply(gate, up).tolist() == (ACT2FN["silu"](gate) * up).tolist()


def test_code_that_cannot_be_probed_is_unknown():
    class Strange(nn.Module):
        act_fn = nn.SiLU()

        def _apply_gate(self, gate_up):
            raise KeyError("weights")

    assert gating_of(Strange()) is None


def test_a_limit_that_the_code_does_not_read_is_not_taken_for_its_own():
    class Experts(nn.Module):
        limit, swiglu_limit, swiglu_alpha, is_concatenated = 3.0, 7.0, 1.702, True

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return Gating("swigluoai", alpha=self.swiglu_alpha, limit=self.swiglu_limit).apply(gate, up)

    assert gating_of(Experts()) == Gating("swigluoai", alpha=1.702, limit=7.0)
