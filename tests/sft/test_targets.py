"""`lora_target`: every linear layer and the experts, in every family; the same adapter in stock PEFT."""

import copy

import pytest
import torch
from ktransformers.models.traits import TRAITS, is_linear
from safetensors.torch import load_file

from ktransformers.errors import SFTError, UnsupportedError
from ktransformers.gguf_files.lora import gguf_to_peft, peft_to_gguf
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.linear import KTransformersLinear
from ktransformers.operators.twin import original
from ktransformers.sft.options import Options
from ktransformers.sft.targets import forget_dropout, lora_config, note_of, without_adapter
from tests import families, tiny
from tests.sft.test_peft import IDS, NOT_IN_C, assert_same_step, logits, mine, step, trained
from tests.tiny import relative_error, save, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED_BY_PEFT = {"nemotron_h": {"mixer.out_proj"}}
"""Family -> linear layers that PEFT puts no adapter on."""


def with_adapter(model, config, seed=7):
    """`model` with a random adapter, the same for any model that has the same names."""
    model = peft.get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(seed)
    for _, tensor in sorted(trained(model).items()):
        tensor.data.normal_(0, 0.1)
    return model


def wrappers(model):
    """Name of a module of the base model -> how many of PEFT's wrappers are around it."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            base = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[base] = found.get(base, 0) + 1
    return found


def inside_router(model, name):
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts) + 1)]
    return any(TRAITS["router"](original(module)) for module in above)


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES, *families.FAMILIES} - NOT_IN_C))
def test_all_reaches_every_linear_layer_and_every_experts_module(family, exact, tmp_path):
    truth = tiny_model(family)
    model = mine(truth.config, save(truth, tmp_path))
    head = model.get_output_embeddings()
    linears = {name for name, m in model.named_modules() if is_linear(original(m)) and m is not head
               and not inside_router(model, name)}  # fmt: skip
    experts = {name for name, m in model.named_modules() if isinstance(m, KTransformersExperts)}
    config = lora_config(model, Options(lora_rank=4))
    model = with_adapter(model, config)
    refused = {name for name in linears if ".".join(name.split(".")[-2:]) in REFUSED_BY_PEFT.get(family, ())}
    assert experts and wrappers(model) == dict.fromkeys(linears - refused, 1) | dict.fromkeys(experts, 2)
    left = without_adapter(model)
    assert set(left) == REFUSED_BY_PEFT.get(family, set()) and bool(note_of(left)) == bool(left)
    assert_same_step(model, with_adapter(truth, config))


@pytest.fixture
def pair(checkpoint):
    """(transformers' DeepSeek-V3, the same by packaged rules): a dense layer, shared experts, and routed ones."""
    reference, folder = checkpoint("deepseek_v3")
    return copy.deepcopy(reference), mine(reference.config, folder)


@pytest.mark.parametrize(
    ("target", "modules", "parameters"),
    [("gate_proj", [], {"mlp.experts.gate_up_proj", "gate_proj.weight"}), ("q_b_proj,router", ["q_b_proj"], {"mlp.gate.weight"}),
     ("shared_experts.down_proj", [], {"shared_experts.down_proj.weight"}), ("mlp.gate", [], {"mlp.gate.weight"}),
     ("experts,o_proj", ["o_proj"], {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"})],
)  # fmt: skip
def test_names_mean_what_they_say(pair, exact, target, modules, parameters):
    truth, model = pair
    config = lora_config(model, Options(lora_rank=4, lora_target=target))
    assert (list(config.target_modules), set(config.target_parameters)) == (modules, parameters)
    assert_same_step(with_adapter(model, config), with_adapter(truth, config))


def test_a_name_that_is_none_is_refused_with_those_that_are(pair):
    with pytest.raises(SFTError, match=r"no 'ruoter' \(did you mean 'router'"):
        lora_config(pair[1], Options(lora_target="ruoter"))


def test_such_an_adapter_goes_to_stock_peft_and_back(pair, exact, tmp_path):
    truth, model = pair
    plain = logits(model)
    model = with_adapter(model, lora_config(model, Options(lora_rank=4)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"].shape[0] == 4
    assert relative_error(logits(peft.PeftModel.from_pretrained(truth, tmp_path)), expected) < 1e-5
    base = model.unload()
    assert relative_error(logits(base), plain) < 1e-5
    assert relative_error(logits(peft.PeftModel.from_pretrained(base, tmp_path)), expected) < 1e-5


WEIGHTS = ["gate_proj.weight", "up_proj.weight"]
DENSE = [{"match": {"name": "gate_proj|up_proj", "trait": "linear"}, "replace": {
    "class": "ktransformers.operators.linear.KTransformersLinear",
    "kwargs": {"generate_op": "KLinearTorch", "generate_device": "cpu", "prefill_device": "cpu"}}}]  # fmt: skip


@pytest.mark.parametrize("rules", ["DeepSeek-V3", DENSE], ids=["packed", "dense"])
def test_weights_of_linear_layers_are_parameters_to_adapt(checkpoint, exact, rules):
    reference, folder = checkpoint("deepseek_v3")
    truth, model = copy.deepcopy(reference), mine(reference.config, folder, rules)
    config = peft.LoraConfig(r=4, target_parameters=WEIGHTS)
    model, truth = with_adapter(model, config), with_adapter(truth, config)
    assert_same_step(model, truth)
    if rules == "DeepSeek-V3":
        with pytest.raises(UnsupportedError, match=r"mlp\.gate_proj: computes from .*kt merge"):
            model.merge_and_unload()
    else:
        assert relative_error(logits(model.merge_and_unload()), logits(truth)) < 1e-5


def test_linear_layers_keep_their_dropout_however_they_are_reached(pair, exact):
    _, model = pair
    model = with_adapter(model, lora_config(model, Options(lora_rank=4, lora_dropout=0.3)))
    reached = [m for _, m in model.named_modules() if type(m).__name__ == "ParamWrapper" and isinstance(m.get_base_layer(), KTransformersLinear)]
    assert reached and all(m.lora_dropout["default"].p == 0.3 for m in reached)
    (loss, _), eval_loss = step(model), model.eval()(input_ids=IDS, labels=IDS).loss.item()
    for wrapper in reached:
        wrapper.lora_dropout["default"].p = 0.0
    assert step(model)[0] != loss and model.eval()(input_ids=IDS, labels=IDS).loss.item() == eval_loss


def test_such_an_adapter_goes_through_a_gguf_file_to_stock_peft(pair, exact, tmp_path):
    """Also where every layer has one of the name, which is then all that a file of targets says."""
    truth, model = pair
    model = with_adapter(model, lora_config(model, Options(lora_rank=4, lora_target="o_proj,gate_proj,down_proj")))
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    peft_to_gguf(tmp_path / "a", tmp_path / "a.gguf", truth.config)
    gguf_to_peft(tmp_path / "a.gguf", truth.config, tmp_path / "back")
    for one in (model.unload(), truth):
        assert relative_error(logits(peft.PeftModel.from_pretrained(one, tmp_path / "back")), expected) < 1e-5


def test_dropout_is_no_part_of_what_is_saved(pair, exact, tmp_path):
    truth, model = pair
    model = with_adapter(model, lora_config(model, Options(lora_rank=4, lora_dropout=0.3)))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.PeftModel.from_pretrained(copy.deepcopy(truth), tmp_path / "a")
    forget_dropout(model)
    model.save_pretrained(tmp_path / "b")
    assert relative_error(logits(peft.PeftModel.from_pretrained(truth, tmp_path / "b")), logits(model)) < 1e-5
