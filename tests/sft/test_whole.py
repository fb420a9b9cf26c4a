"""Weights that are trained themselves: gradients and saved models are those of transformers' own model."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ktransformers.errors import SFTError, UnsupportedError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.operators.experts import KExpertsCPU
from ktransformers.sft.whole import unfreeze
from tests import families, tiny
from tests.sft.test_peft import EXPERTS, NOT_IN_C, adapted, assert_same_step, logits, mine, step, trained
from tests.tiny import random_ids, relative_error, save, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES, *families.FAMILIES} - NOT_IN_C))
def test_every_weight_of_every_family_is_trained_as_transformers_does(family, exact, tmp_path):
    truth = tiny_model(family)
    model = mine(truth.config, save(truth, tmp_path))
    plain = logits(model)
    unfreeze(model)
    truth.requires_grad_(True)
    assert dict(model.named_parameters()).keys() == dict(truth.named_parameters()).keys()
    assert relative_error(logits(model), plain) < 1e-5
    assert_same_step(model, truth, limit=1e-5)
    for one in (model, truth):
        torch.optim.SGD(trained(one).values(), lr=1e-3).step()
    assert relative_error(logits(model), logits(truth)) < 1e-4  # of weights that differ by rounding


@pytest.fixture
def pair(checkpoint):
    """Call with a family: (transformers' model, the same folder by packaged rules)."""

    def make(family="qwen3_moe"):
        reference, folder = checkpoint(family)
        return copy.deepcopy(reference), mine(reference.config, folder)

    return make


def chosen(model, *names):
    """transformers' model with the modules of these names alone to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{n}." in f".{name}." for n in names))
    return model


NAMES = {
    "qwen3_moe": ["experts", "embed_tokens", "lm_head", "norm", "mlp.gate", "q_proj", "o_proj", "layers.1", "layers.2.mlp"],
    "deepseek_v3": ["q_a_proj", "kv_b_proj", "o_proj", "shared_experts", "gate_proj", "layers.0.mlp", "q_a_layernorm"],
    "qwen3_next": ["in_proj_qkvz", "conv1d", "linear_attn.out_proj", "shared_expert.up_proj", "shared_expert_gate"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in NAMES.items() for name in names])
def test_what_is_named_is_trained_and_nothing_else(pair, exact, family, name):
    truth, model = pair(family)
    plain = logits(model)
    unfreeze(model, [name])
    assert trained(model).keys() == trained(chosen(truth, name)).keys() != set()
    assert relative_error(logits(model), plain) < 1e-5
    assert_same_step(model, truth, limit=1e-5)
    for one in (model, truth):
        torch.optim.SGD(trained(one).values(), lr=0.02).step()
    expected = logits(truth)
    # delta nets multiply what weights differ by after a step: 8e-5, all others 1e-6
    assert relative_error(logits(model), expected) < 2e-4 < 5e-4 < relative_error(plain, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_in_16_bits_are_trained_in_them(family, dtype, tmp_path):
    truth = tiny_model(family).to(dtype)
    experts = mine(truth.config, save(truth, tmp_path)).model.layers[1].mlp.experts
    theirs, made = truth.model.layers[1].mlp.experts, []
    for one in (experts.requires_grad_(True), theirs):
        hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
        ids = torch.randint(8, (20, 3), generator=torch.Generator().manual_seed(6))
        out = one(hidden, ids, torch.full((20, 3), 0.25).to(dtype))
        out.backward(hidden.detach())
        made.append({"out": out, "hidden": hidden.grad, **{name: p.grad for name, p in one.named_parameters()}})
    assert made[0].keys() == made[1].keys() and {t.dtype for t in made[0].values()} == {dtype}
    for name, expected in made[1].items():
        assert relative_error(made[0][name].float(), expected.float()) < 0.02, name  # roundings to 8 bits differ


def test_one_weight_of_embedding_and_head_stays_one(exact, tmp_path):
    truth = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model = mine(truth.config, save(truth, tmp_path))
    unfreeze(model, ["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_step(model, chosen(truth, "embed_tokens", "lm_head"), limit=1e-5)


def test_experts_are_parameters_once_they_are_to_be_trained(pair, exact):
    truth, model = pair()
    experts = model.model.layers[1].mlp.experts
    plain = logits(model)
    assert not list(experts.parameters()) and isinstance(experts.active, KExpertsCPU)
    assert experts.requires_grad_(True) is experts and experts.gate_up_proj.requires_grad
    assert torch.equal(experts.gate_up_proj, truth.model.layers[1].mlp.experts.gate_up_proj)
    assert relative_error(logits(model), plain) < 1e-5
    experts.requires_grad_(False)
    assert not experts.gate_up_proj.requires_grad
    experts.unload(), experts.load()
    assert relative_error(logits(model), plain) < 1e-5


def test_an_adapter_on_experts_that_are_parameters(pair, exact):
    truth, model = pair()
    unfreeze(model)
    assert_same_step(adapted(model, target_parameters=EXPERTS), adapted(truth, target_parameters=EXPERTS))


WHOLE = ["embed_tokens", "lm_head", "input_layernorm", "norm", "mlp.gate", "o_proj", "experts"]


@pytest.mark.parametrize("name", WHOLE)
def test_peft_trains_modules_whole_beside_adapters(pair, exact, name, tmp_path):
    truth, model = pair()
    config = {"target_modules": ["q_proj"], "modules_to_save": [name]}
    model, truth = adapted(model, **config), adapted(truth, **config)
    assert_same_step(model, truth)
    model.save_pretrained(tmp_path)
    again, fresh = pair()
    for one in (again, fresh):
        assert relative_error(logits(peft.PeftModel.from_pretrained(one, tmp_path)), logits(model)) < 1e-5


def test_quantized_weights_are_refused_before_anything_is_changed(checkpoint, tmp_path):
    reference, folder = checkpoint("qwen3_moe")
    quantize_folder(folder, tmp_path / "q8.gguf", "Q8_0")
    model = mine(reference.config, tmp_path / "q8.gguf")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"experts: stored as Q8_0, and quantized weights are not trained.*LoRA"):
        unfreeze(model, ["experts"])
    with pytest.raises(UnsupportedError, match="and 11 more"):
        unfreeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    for name in ("mlp.experts", "self_attn.q_proj"):
        with pytest.raises(UnsupportedError, match=rf"layers\.0\.{name}: stored as Q8_0"):
            model.model.layers[0].get_submodule(name).requires_grad_(True)
        with pytest.raises(UnsupportedError, match=rf"{name.split('.')[-1]}: stored as Q8_0"):
            adapted(model, target_modules=["o_proj"], modules_to_save=[name])
    unfreeze(model, ["norm", "mlp.gate"])
    assert all(gradient is not None for gradient in step(model)[1].values())
    with pytest.raises(UnsupportedError, match="quantized bytes"):
        model.save_pretrained(tmp_path / "out")


def test_a_name_that_is_none_is_refused(pair):
    with pytest.raises(SFTError, match=r"no module 'expert' \(did you mean 'experts'"):
        unfreeze(pair()[1], ["expert"])


def test_experts_on_a_gpu_are_refused(checkpoint):
    reference, folder = checkpoint("qwen3_moe")
    kwargs = {"generate_device": "cpu", "prefill_device": "cpu", "gpu_experts": 2, "gpu_device": "cpu"}
    rules = [{"match": {"trait": "experts"}, "replace": {"class": "ktransformers.operators.experts.KTransformersExperts", "kwargs": kwargs}}]
    with pytest.raises(UnsupportedError, match=r"mlp\.experts: some experts are on cpu.*gpu_experts"):
        unfreeze(mine(reference.config, folder, rules))


@pytest.mark.parametrize("names", [[], ["experts", "norm"]], ids=["all", "some"])
def test_the_stock_trainer_trains_and_saves_what_transformers_loads(pair, exact, names, tmp_path):
    truth, model = pair()
    unfreeze(model, names)
    chosen(truth, *names) if names else truth.requires_grad_(True)
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(4, 16)]
    for one, folder in ((model, "ours"), (truth, "theirs")):
        how = TrainingArguments(
            str(tmp_path / folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, optim="sgd",
            report_to="none", use_cpu=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(one, how, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(tmp_path / folder))
    expected = logits(truth)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert relative_error(logits(model), expected) < 1e-5 and relative_error(logits(again), expected) < 1e-5
    assert relative_error(logits(pair()[0]), expected) > 1e-3


def test_attention_stays_a_native_call_until_its_weights_are_written_to(pair, exact):
    _, model = pair()
    attention = model.model.layers[1].self_attn
    unfreeze(model, ["q_proj"])
    logits(model)
    assert attention.native is not None and attention.is_as_loaded()
    with torch.no_grad():
        attention.q_proj.weight.add_(1)
    assert not attention.is_as_loaded()
