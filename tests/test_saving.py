"""What can be saved of a model with operators, and PEFT on one: it works, or says what to do."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktransformers import optimize_and_load
from ktransformers.errors import UnsupportedError
from ktransformers.gguf_files.write import quantize_folder
from tests.tiny import meta_model, random_ids, relative_error

IDS = random_ids(1, 9)


def rule(trait, operator, **kwargs):
    kwargs = {"generate_device": "cpu", **kwargs}
    return {"match": {"trait": trait}, "replace": {"class": f"ktransformers.operators.{operator}", "kwargs": kwargs}}


PLACED = [
    rule("norm", "layernorm.RMSNorm"),
    rule("rotary", "RoPE.RotaryEmbedding"),
    rule("attention", "attention.KQwen3MoeAttention"),
    rule("router", "gate.KMoEGate"),
]
DENSE = rule("linear", "linear.KTransformersLinear", generate_op="KLinearTorch")
PACKED = rule("linear", "linear.KTransformersLinear", generate_op="KLinearCPUInfer")
EXPERTS = {op: rule("experts", "experts.KTransformersExperts", generate_op=op) for op in ("KExpertsTorch", "KExpertsCPU")}


@pytest.fixture
def build(checkpoint):
    """Call with rules: the tiny model with them."""
    reference, folder = checkpoint("qwen3_moe")

    def make(*rules):
        return optimize_and_load(meta_model(reference.config), list(rules), folder, default_device="cpu", progress=False)

    make.reference, make.folder = reference, folder
    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("rules", [PLACED, [*PLACED, DENSE]], ids=["placed", "dense"])
def test_a_model_whose_weights_are_all_dense_is_saved_as_any_other(build, rules, tmp_path):
    build(*rules).save_pretrained(tmp_path)
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(build.reference)) < 1e-5


@pytest.mark.parametrize("one", [PACKED, *EXPERTS.values()], ids=["linear", *EXPERTS])
def test_what_operators_compute_from_a_checkpoint_in_floats_is_saved_from_there(build, one, tmp_path):
    build(*PLACED, one).save_pretrained(tmp_path)
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(build.reference)) < 1e-5


@pytest.mark.parametrize("one", [PACKED, *EXPERTS.values()], ids=["linear", *EXPERTS])
def test_a_model_that_computes_from_quantized_bytes_says_what_to_copy(build, one, tmp_path):
    quantize_folder(build.folder, tmp_path / "model.gguf", "Q8_0")
    model = optimize_and_load(meta_model(build.reference.config), [*PLACED, one], tmp_path / "model.gguf", default_device="cpu", progress=False)
    with pytest.raises(UnsupportedError, match=r"tensors from the quantized bytes of .* Copy that checkpoint"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def lora():
    """Call with a model: PEFT's model of it, adapters on the query and output projections."""
    peft = pytest.importorskip("peft")

    def make(model):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    return make


@pytest.mark.parametrize("rules", [PLACED, [*PLACED, DENSE, EXPERTS["KExpertsTorch"]]], ids=["placed", "torch"])
def test_peft_trains_saves_loads_and_merges(build, lora, rules, tmp_path):
    import peft

    model = lora(build(*rules))
    assert relative_error(logits(model), logits(build.reference)) < 1e-4
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 12 and all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(*rules), tmp_path)
    assert relative_error(logits(again), logits(model)) < 1e-6
    assert relative_error(logits(again.merge_and_unload()), logits(model)) < 1e-4


def test_merging_into_packed_weights_says_what_to_do(build, lora):
    with pytest.raises(UnsupportedError, match=r"q_proj.weight: computes from packed bytes.*; name KLinearTorch for it in the rule"):
        lora(build(PACKED)).merge_and_unload()
