"""Model, rotary, router and block operators: placement, recomputed buffers, and refusals in words."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ktransformers.operators.attention import KDeepseekV2Attention
from ktransformers.operators.base_operator import load_weights
from ktransformers.operators.experts import (
    KDeepseekV2MoE,
    KDeepseekV3MoE,
    KMistralSparseMoEBlock,
    KQwen2MoeSparseMoeBlock,
    KQwen3MoeSparseMoeBlock,
)
from ktransformers.operators.gate import KMoEGate
from ktransformers.operators.linear import KTransformersLinear
from ktransformers.operators.models import KDeepseekV2Model, KQwen2MoeModel, KQwen3MoeModel
from ktransformers.operators.RoPE import RotaryEmbedding, YarnRotaryEmbedding, YarnRotaryEmbeddingV3
from ktransformers.simulator.fake import fake_devices
from tests.dict_weights import DictWeights
from tests.tiny import YARN, meta_model, random_ids, relative_error, tiny_config, tiny_model

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


# --- rotary --------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [DEFAULT, YARN, DYNAMIC], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("operator", [RotaryEmbedding, YarnRotaryEmbedding, YarnRotaryEmbeddingV3])
def test_rotary_from_meta_equals_transformers_bit_for_bit(family, rope, operator):
    config = tiny_config(family, rope_parameters=rope, max_position_embeddings=16)
    truth = tiny_model(family, rope_parameters=rope, max_position_embeddings=16).model.rotary_emb
    module = operator("model.rotary_emb", None, config, meta_model(config).model.rotary_emb, "cpu")
    module.load()
    x = torch.zeros(1, 1, 64)
    for length in (5, 40, 7):  # past max_position_embeddings and back: dynamic scaling keeps state
        positions = torch.arange(length).unsqueeze(0)
        found, expected = module(x, positions), truth(x, positions)
        pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
        assert all(torch.equal(f, e) for f, e in pairs)
    assert not module.state_dict()


def test_transformers_own_initialization_leaves_a_loaded_rotary_as_it_is():
    config = tiny_config("deepseek_v3", rope_parameters=YARN)
    model = meta_model(config)
    model.model.rotary_emb = RotaryEmbedding("model.rotary_emb", None, config, model.model.rotary_emb, "cpu")
    model.model.rotary_emb.load()
    before = model.model.rotary_emb.inv_freq.clone()
    model._init_weights(model.model.rotary_emb)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


# --- router and blocks ---------------------------------------------------------------


def test_a_router_operator_is_a_router_and_equals_it(family):
    truth = tiny_model(family)
    key = "model.layers.2.mlp.gate"
    original = meta_model(truth.config).get_submodule(key)
    gate = KMoEGate(key, DictWeights(truth.state_dict()), truth.config, original, "cpu")
    gate.load()
    hidden = torch.randn(9, 64)
    with torch.no_grad():
        found, expected = gate(hidden), truth.get_submodule(key)(hidden)
    assert isinstance(gate, type(original)) and isinstance(gate, KMoEGate)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


BLOCKS = {
    "deepseek_v2": KDeepseekV2MoE,
    "deepseek_v3": KDeepseekV3MoE,
    "qwen2_moe": KQwen2MoeSparseMoeBlock,
    "qwen3_moe": KQwen3MoeSparseMoeBlock,
    "mixtral": KMistralSparseMoEBlock,
}


def test_a_block_equals_the_original_with_its_own_children(family):
    truth = tiny_model(family).model.layers[2].mlp
    block = BLOCKS[family]("model.layers.2.mlp", None, None, copy.deepcopy(truth), "cpu")
    hidden = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden), truth(hidden), rtol=1e-6, atol=1e-6)


def test_mixtral_jitters_in_training_only():
    mlp = tiny_model("mixtral", router_jitter_noise=0.3).model.layers[0].mlp
    block = KMistralSparseMoEBlock("a", None, None, mlp, "cpu")
    hidden = torch.randn(1, 5, 64)
    with torch.no_grad():
        assert torch.equal(block.eval()(hidden), block(hidden))
        assert not torch.equal(block.train()(hidden), block(hidden))


@pytest.mark.parametrize("operator", set(BLOCKS.values()), ids=lambda operator: operator.__name__)
def test_a_block_refuses_a_family_whose_parts_it_would_lose(family, operator):
    mlp = meta_model(tiny_config(family)).model.layers[2].mlp
    fits = operator.children_expected == {name for name, _ in mlp.named_children()}
    problems = operator.check("a", mlp, {})
    assert (problems == []) is fits
    assert fits or type(mlp).__name__ in problems[0]


def test_check_refuses_other_modules():
    model = meta_model(tiny_config("deepseek_v3"))
    assert (
        "found DeepseekV3MLP with act_fn, down_proj"
        in KDeepseekV3MoE.check("a", model.model.layers[0].mlp, {})[0]
    )
    assert "found Linear" in KMoEGate.check("a", nn.Linear(2, 2), {})[0]
    assert "found Linear" in RotaryEmbedding.check("a", nn.Linear(2, 2), {})[0]
    assert KMoEGate.check("a", model.model.layers[2].mlp.gate, {}) == []
    assert RotaryEmbedding.check("a", model.model.rotary_emb, {}) == []


# --- model ---------------------------------------------------------------------------


def test_check_of_the_model_operator_lists_every_problem():
    model = meta_model(tiny_config("qwen2_moe"))
    check = KQwen2MoeModel.check
    assert (
        check(
            "model",
            model.model,
            {"transfer_map": {1: "cpu", "2": "cpu"}, "per_layer_prefill_intput_threshold": 0},
        )
        == []
    )
    problems = check(
        "model",
        model.model,
        {"transfer_map": {3: "cpu", "one": "cpu", "-1": "cpu"}, "per_layer_prefill_intput_threshold": 9},
    )
    assert len(problems) == 4
    assert "layer 3 does not exist; the model has layers 0 to 2" in problems[1]
    assert "'one' is no layer number" in problems[2]
    assert "found ModuleList" in check("model.layers", model.model.layers, {})[0]


def test_the_model_operator_is_a_model_of_its_family():
    truth = tiny_model("qwen3_moe")
    model = copy.deepcopy(truth)
    model.model = KQwen3MoeModel(
        "model", DictWeights(truth.state_dict()), model.config, model.model, "cpu", transfer_map={1: "cpu"}
    )
    model.model.load()
    model.eval()
    assert isinstance(model.model, PreTrainedModel) and isinstance(model.model, type(truth.model))
    assert model.get_decoder() is model.model and model.get_input_embeddings() is model.model.embed_tokens
    assert model.model.device == model.device and list(model.state_dict()) == list(truth.state_dict())
    ids = random_ids(1, 6)
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        found, expected = model(ids, **wanted), truth(ids, **wanted)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(f, e) for f, e in zip(found.hidden_states, expected.hidden_states, strict=True))
    assert len(found.attentions) == len(expected.attentions) and len(found.router_logits) == len(
        expected.router_logits
    )


def on_devices(family, operator, transfer_map, lm_head):
    """A fake-tensor model: embedding on the CPU, layer 0 on cuda:0, the rest where `transfer_map` says."""
    with torch.device("meta"):
        model = meta_model(tiny_config(family))
    model.set_experts_implementation(
        "batched_mm"
    )  # the one that neither reads values nor asks for CUDA's version
    devices = {"model": "cuda:0", "model.embed_tokens": "cpu", "lm_head": lm_head}
    device = "cuda:0"
    for number in range(3):
        device = transfer_map.get(number, transfer_map.get(str(number), device))
        devices[f"model.layers.{number}"] = device
    devices["model.norm"] = device
    weights = DictWeights({name: torch.empty(t.shape) for name, t in model.state_dict().items()})
    weights.tensor = lambda name, device, dtype: torch.empty(weights.shape(name), dtype=dtype, device=device)
    if operator is not None:
        model.model = operator(
            "model", weights, model.config, model.model, "cuda:0", transfer_map=transfer_map
        )
    model.model.rotary_emb = RotaryEmbedding(
        "model.rotary_emb", weights, model.config, model.model.rotary_emb, "cuda:0"
    )
    load_weights(model, weights, "", devices)
    return model


@pytest.mark.parametrize(
    "family, operator",
    [("deepseek_v3", KDeepseekV2Model), ("deepseek_v2", KDeepseekV2Model), ("mixtral", KQwen2MoeModel)],
)
@pytest.mark.parametrize("transfer_map", [{1: "cuda:1"}, {"1": "cuda:1", "2": "cuda:2"}, {2: "cpu"}], ids=str)
def test_transfer_map_moves_everything_a_layer_is_given(family, operator, transfer_map):
    last = list(transfer_map.values())[-1]
    with fake_devices():
        model = on_devices(family, operator, transfer_map, last)
        ids = torch.zeros(2, 6, dtype=torch.long, device="cuda:0")
        mask = torch.ones(2, 6, dtype=torch.long, device="cuda:0")
        positions = torch.arange(6, device="cuda:0").unsqueeze(0)
        hidden = model.model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        assert hidden.device == torch.device(last) and hidden.shape == (2, 6, 64)
        assert not model.model._moved  # nothing is kept between calls


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_all_torch_operators_on_two_gpus_never_mix_devices(family):
    """Embedding on the CPU, layer 0 on cuda:0, the others on cuda:1; every linear, router, block and
    attention is ours.
    """
    with fake_devices():
        model = on_devices(family, None, {}, "cuda:1")
        weights, config, place = model.model.rotary_emb.gguf_loader, model.config, {0: "cuda:0"}
        for name, module in list(model.named_modules()):
            parts = name.split(".")
            device = (
                place.get(int(parts[2]), "cuda:1")
                if name.startswith("model.layers.") and len(parts) > 2
                else "cuda:1"
            )
            parent, child = model.get_submodule(".".join(parts[:-1])), parts[-1]
            make = (name, weights, config, module)
            if isinstance(module, nn.Linear):
                setattr(parent, child, KTransformersLinear(*make, device, "KLinearTorch", device))
            elif child == "self_attn" and hasattr(module, "kv_b_proj"):
                setattr(parent, child, KDeepseekV2Attention(*make, device))
            elif child == "gate" and hasattr(module, "top_k"):
                setattr(parent, child, KMoEGate(*make, device))
            elif child == "mlp" and hasattr(module, "experts"):
                setattr(parent, child, BLOCKS[family](*make, device))
        model.model = KDeepseekV2Model(
            "model", weights, config, model.model, "cuda:0", transfer_map={1: "cuda:1"}
        )
        devices = {"": "cuda:1", "model.embed_tokens": "cpu", "model.layers.0": "cuda:0"}
        load_weights(model, weights, "", devices)
        cache = DynamicCache(config=config)
        for length in (6, 1):
            ids = torch.zeros(2, length, dtype=torch.long)
            logits = model(ids, past_key_values=cache, use_cache=True).logits
            assert logits.shape == (2, length, 128) and logits.device == torch.device("cuda:1")
        assert [layer.keys.device.index for layer in cache.layers] == [0, 1, 1]


def test_a_layer_after_the_map_s_last_entry_is_fed_there_whatever_its_weights_say():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.on_the_cpu = nn.Parameter(torch.empty(1))

        def forward(self, hidden, position_ids=None, **kwargs):
            self.seen = {hidden.device, position_ids.device}
            return hidden

    with fake_devices():
        model = on_devices("mixtral", KQwen2MoeModel, {1: "cuda:1"}, "cuda:1")
        probe = model.model.layers[2] = Probe()
        model.model.watch_layers()
        model.model(torch.zeros(2, 6, dtype=torch.long))
        assert probe.seen == {torch.device("cuda:1")}


def test_without_the_operator_the_devices_do_not_meet():
    with fake_devices(), pytest.raises(Exception, match="device"):
        model = on_devices("mixtral", None, {1: "cuda:1"}, "cuda:1")
        model.model(torch.zeros(2, 6, dtype=torch.long, device="cpu"))


def test_layers_replaced_after_loading_are_watched_again():
    truth = tiny_model("mixtral")
    operator = KQwen2MoeModel(
        "model", DictWeights(truth.state_dict()), truth.config, truth.model, "cpu", transfer_map={1: "cpu"}
    )
    operator.load()
    operator.load()
    assert all(len(layer._forward_pre_hooks) == 0 for layer in operator.layers)  # on one device nothing moves
    ids = random_ids(1, 4)
    with torch.no_grad():
        assert relative_error(operator(ids).last_hidden_state, truth.model(ids).last_hidden_state) == 0
