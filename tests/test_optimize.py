"""The whole path, rules to tokens, equals transformers' own model; and whatever fails leaves the model untouched."""

import copy
import os
import shutil

import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import ktransformers
from ktransformers import optimize
from ktransformers.errors import KTransformersError, RuleError, UnsupportedError, WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.operators.base_operator import BaseInjectedModule
from tests.tiny import FAMILIES, meta_model, random_ids, relative_error, save, tiny_config, tiny_model

CPU = {"cuda": "cpu"}
LINEAR = "ktransformers.operators.linear.KTransformersLinear"
EXPERTS = "ktransformers.operators.experts.KTransformersExperts"

# Each operator alone, by the trait of what it replaces, then everything the packaged file replaces.
ALONE = {
    "linear-cpu": {
        "trait": "linear",
        "class": LINEAR,
        "generate_op": "KLinearCPUInfer",
        "prefill_op": "KLinearCPUInfer",
    },
    "linear-torch": {"trait": "linear", "class": LINEAR, "generate_op": "KLinearTorch", "prefill_op": "KLinearTorch"},
    "linear-example": {"trait": "linear", "class": "ktransformers.operators.linear.LinearTorchInject"},
    "experts-cpu": {"trait": "experts", "class": EXPERTS, "generate_op": "KExpertsCPU"},
    "experts-torch": {
        "trait": "experts",
        "class": EXPERTS,
        "generate_op": "KExpertsTorch",
        "prefill_op": "KExpertsTorch",
    },
    "router": {"trait": "router", "class": "ktransformers.operators.gate.KMoEGate"},
    "rope": {"trait": "rotary", "class": "ktransformers.operators.RoPE.RotaryEmbedding"},
    "mla": {"trait": "mla", "class": "ktransformers.operators.attention.KDeepseekV2Attention"},
}


def alone(name):
    spec = dict(ALONE[name])
    trait, operator = spec.pop("trait"), spec.pop("class")
    return [{"match": {"trait": trait}, "replace": {"class": operator, "kwargs": {"generate_device": "cpu", **spec}}}]


def load(family, folder, rule, weights=None, **options):
    model = meta_model(AutoConfig.from_pretrained(folder))
    options = {"devices": CPU, "progress": False} | options
    return ktransformers.optimize_and_load(model, rule, weights, **options)


def greedy(model, ids, count=32, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, max_new_tokens=count, **options)[:, ids.shape[1] :]


# --- equal to transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALONE))
def test_every_operator_alone_equals_transformers(checkpoint, family, name):
    if name == "mla" and "deepseek" not in family:
        pytest.skip("no MLA in this family")
    reference, folder = checkpoint(family)
    model = load(family, folder, alone(name))
    assert any(isinstance(module, BaseInjectedModule) for module in model.modules())
    ids = random_ids(2, 17)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


@pytest.fixture(scope="module")
def everything(checkpoint):
    """Per family: transformers' model, and ours with every operator of the packaged rule file."""
    made = {}

    def make(family):
        if family not in made:
            reference, folder = checkpoint(family)
            made[family] = reference, load(family, folder, DEFAULT_RULES[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def gguf(checkpoint, tmp_path_factory):
    """Per family and type: the checkpoint as one GGUF file."""
    made = {}

    def make(family, kind="F32", **options):
        key = (family, kind, repr(options))
        if key not in made:
            path = tmp_path_factory.mktemp("gguf") / f"{family}-{kind}.gguf"
            quantize_folder(checkpoint(family)[1], path, kind, **options)
            made[key] = path
        return made[key]

    return make


def test_the_packaged_rules_equal_transformers(everything, family):
    reference, model = everything(family)
    ids = random_ids(2, 33)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    assert torch.equal(greedy(model, ids), greedy(reference, ids))


def test_chunked_prefill_equals_one_shot(everything, family):
    reference, model = everything(family)
    ids = random_ids(1, 40)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=7), greedy(reference, ids))


def test_a_left_padded_batch_equals_its_single_prompts(everything, family):
    _, model = everything(family)
    prompts = [random_ids(1, length, seed=length) for length in (5, 11, 16)]
    batch = torch.cat([nn.functional.pad(p, (16 - p.shape[1], 0)) for p in prompts])
    together = greedy(model, batch, count=16, attention_mask=(batch != 0).long())
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, greedy(model, prompt, count=16)[0])


def test_a_static_cache_equals_a_dynamic_one(everything, family):
    _, model = everything(family)
    ids = random_ids(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(greedy(model, ids, past_key_values=cache), greedy(model, ids))


def test_a_gguf_file_equals_the_safetensors(gguf, checkpoint, family):
    reference, folder = checkpoint(family)
    model = load(family, folder, DEFAULT_RULES[family], gguf(family))
    ids = random_ids(2, 19)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_a_split_gguf_and_a_folder_of_them_load(gguf, checkpoint, tmp_path):
    _, folder = checkpoint("qwen3_moe")
    whole = load("qwen3_moe", folder, "Qwen3-MoE", gguf("qwen3_moe"))
    first = gguf("qwen3_moe", "F32", split=4)
    parts = sorted(first.parent.glob("*-of-*.gguf"))
    assert len(parts) > 1
    ids = random_ids(1, 9)
    for weights in (parts[0], first.parent):
        model = load("qwen3_moe", folder, "Qwen3-MoE", weights)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)


# Median over tokens of mean|difference| / mean|logit|, the largest of four seeds and five families: 1e-6, 1e-6, 0.070.
MEDIAN_ERROR = {"F16": 1e-5, "BF16": 1e-5, "Q8_0": 0.14}


@pytest.mark.parametrize("kind", list(MEDIAN_ERROR))
def test_a_quantized_file_computes_what_its_dequantized_weights_say(gguf, checkpoint, family, kind):
    """Kernels round activations to int8 for quantized weights, and not at all for float weights in an fp32 model.

    The median, because a token whose router was nearly undecided takes another expert after rounding, and random
    routers are often undecided.
    """
    _, folder = checkpoint(family)
    ids = random_ids(4, 24)
    native = load(family, folder, DEFAULT_RULES[family], gguf(family, kind))
    dense = load(family, folder, [*alone("linear-torch"), *alone("experts-torch")], gguf(family, kind))
    with torch.no_grad():
        ours, theirs = native(ids).logits, dense(ids).logits
    error = ((ours - theirs).abs().mean(-1) / theirs.abs().mean(-1)).median().item()
    assert error < MEDIAN_ERROR[kind]


def test_an_fp32_model_of_bf16_weights_keeps_fp32(gguf, checkpoint):
    """Logits within 1e-4 of transformers' with the same weights, and the same ones in chunks and token by token."""
    reference, folder = checkpoint("deepseek_v3")
    reference = copy.deepcopy(reference)
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if tensor.dim() > 1 and not name.endswith("mlp.gate.weight"):  # vectors and routers stay F32 in the file
                tensor.copy_(tensor.bfloat16())
    model = load("deepseek_v3", folder, DEFAULT_RULES["deepseek_v3"], gguf("deepseek_v3", "BF16"))
    ids = random_ids(1, 64, seed=2)  # with seed 1 two experts score alike for token 53, and rounding decides
    with torch.no_grad():
        once = model(ids).logits
        assert relative_error(once, reference(ids).logits) < 1e-4
        for chunk in (1, 7, 40):
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
            assert relative_error(torch.cat(parts, 1), once) < 1e-5, chunk


def test_sharded_safetensors_load(checkpoint, tmp_path):
    reference, _ = checkpoint("deepseek_v3")
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load("deepseek_v3", tmp_path, "DeepSeek-V3")
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_tied_embeddings_need_no_lm_head_in_the_file(tmp_path):
    reference = tiny_model("qwen3_moe", tie_word_embeddings=True)
    reference.tie_weights()
    save(reference, tmp_path)
    ids = random_ids(1, 8)
    for rule in ("Qwen3-MoE", alone("experts-cpu")):
        with torch.no_grad():
            assert relative_error(load("qwen3_moe", tmp_path, rule)(ids).logits, reference(ids).logits) < 1e-4


@pytest.mark.parametrize("rules", ["TUTORIAL", "TUTORIAL_TWO_GPUS"])
def test_the_tutorials_rules_run_as_printed(tmp_path, rules):
    from tests.rules import test_plan

    layers = 60 if rules == "TUTORIAL_TWO_GPUS" else 3  # its expressions name layers 0 to 29 and 30 to 59
    reference = tiny_model("deepseek_v2", num_hidden_layers=layers)
    save(reference, tmp_path)
    (tmp_path / "rule.yaml").write_text(getattr(test_plan, rules))
    model = load("deepseek_v2", tmp_path, tmp_path / "rule.yaml")
    names = {type(module).__name__ for module in model.modules()}
    assert "KTransformersExperts" in names and ("KDeepseekV2Attention" in names or "KDeepseekV2Model" in names)
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_router_logits_and_attentions_can_still_be_asked_for(everything, family):
    reference, model = everything(family)
    ids = random_ids(1, 6)
    with torch.no_grad():
        ours = model(ids, output_router_logits=True, output_hidden_states=True)
        theirs = reference(ids, output_router_logits=True, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    if theirs.get("router_logits"):
        for a, b in zip(ours.router_logits, theirs.router_logits, strict=True):
            assert relative_error(a, b) < 1e-4


# --- what a loaded model is ---------------------------------------------------------------------------------------------


def test_a_loaded_model_is_complete_and_says_where_it_is(everything, family):
    _, model = everything(family)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training and len(model.hf_device_map) > 1 and set(model.hf_device_map.values()) == {"cpu"}
    assert model.gguf_loader.has("model.norm.weight") and model.device.type == "cpu" and model.dtype == torch.float32
    assert not any("orig_module" in name for name, _ in model.named_modules())
    expert_names = [name for name, _ in model.named_parameters() if "experts.gate_up" in name]
    assert not expert_names, "routed experts are not parameters, so .to() cannot drag them to a GPU"


def test_weights_default_to_the_configs_folder_and_generation_config_is_read(checkpoint, tmp_path, monkeypatch):
    _, folder = checkpoint("mixtral")
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "max_new_tokens": 3}')
    assert load("mixtral", tmp_path / "m", "Mixtral").generation_config.eos_token_id == [7, 9]
    monkeypatch.chdir(tmp_path / "m")
    assert load("mixtral", ".", "Mixtral").generation_config.eos_token_id == [7, 9]


def test_upstreams_spelling_is_the_same_thing(gguf, checkpoint):
    reference, folder = checkpoint("qwen2_moe")
    config = AutoConfig.from_pretrained(folder)
    model = meta_model(config)
    ktransformers.optimize_and_load_gguf(
        model, alone("experts-cpu"), str(gguf("qwen2_moe")), config, default_device="cpu"
    )
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_dtype_of_the_meta_model_is_kept(checkpoint):
    _, folder = checkpoint("deepseek_v3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    ktransformers.optimize_and_load(model, "DeepSeek-V3", devices=CPU, progress=False)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32, "as from_pretrained has it"
    assert model(random_ids(1, 5)).logits.dtype == torch.bfloat16


def test_kt_debug_prints_the_plan(checkpoint, monkeypatch, capfd):
    monkeypatch.setenv("KT_DEBUG", "1")
    load("mixtral", checkpoint("mixtral")[1], "Mixtral")
    printed = capfd.readouterr().err
    assert "model.layers.*.mlp.experts" in printed and "KExpertsCPU" in printed and "F32" in printed


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def state(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [
        (name, t.device.type, tuple(t.shape)) for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]


def refused(model, rule, weights, kind, message, **options):
    """Check that loading raises `kind` with `message`, and changes nothing."""
    before = state(model)
    with pytest.raises(kind, match=message):
        ktransformers.optimize_and_load(model, rule, weights, **({"devices": CPU, "progress": False} | options))
    assert state(model) == before and not hasattr(model, "gguf_loader")


def test_a_gpu_rule_without_a_gpu_says_what_to_pass(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, folder = checkpoint("deepseek_v3")
    linears = {"class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": {"generate_device": "cuda"}}
    refused(
        meta_model(tiny_config("deepseek_v3")),
        [{"match": {"trait": "linear"}, "replace": linears}],
        folder,
        RuleError,
        r"devices=\{'cuda': 'cpu'\}",
        devices=None,
    )


def test_gpu_operators_give_way_with_a_notice(checkpoint):
    reference, folder = checkpoint("qwen3_moe")
    rules = [
        {"match": {"trait": "experts"}, "replace": {"class": EXPERTS, "kwargs": {
            "generate_device": "cuda", "generate_op": "MLPCUDAExperts", "prefill_device": "cuda"}}, "recursive": False},
        {"match": {"trait": "linear"}, "replace": {"class": LINEAR, "kwargs": {
            "generate_device": "cuda", "generate_op": "QuantizedLinearMarlin", "prefill_device": "cuda"}}},
    ]  # fmt: skip
    from ktransformers.operators import base_operator

    base_operator._told.clear()
    with pytest.warns(UserWarning, match="KLinearMarlin runs on GPUs only") as caught:
        model = load("qwen3_moe", folder, rules)
    assert sum("obsolete" in str(w.message) for w in caught) == 2
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_every_missing_unused_and_misshapen_tensor_is_listed_at_once(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = checkpoint("deepseek_v3")
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 64)
    tensors["model.layers.0.self_attn.surplus.weight"] = torch.zeros(2)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightError) as caught:
        load("deepseek_v3", tmp_path / "m", "DeepSeek-V3")
    text = str(caught.value)
    for part in ("model.norm.weight", "experts.3.up_proj", "lm_head.weight", "[3, 64]", "surplus"):
        assert part in text, text


def test_weights_that_cannot_be_opened(tmp_path, checkpoint):
    _, folder = checkpoint("mixtral")
    model = meta_model(tiny_config("mixtral"))
    refused(model, "Mixtral", tmp_path / "none", WeightError, "no such file or folder")
    refused(model, "Mixtral", tmp_path, WeightError, "without weights")
    refused(model, "Mixtral", None, WeightError, "weights: not given")
    truncated = tmp_path / "model.safetensors"
    truncated.write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    refused(model, "Mixtral", truncated, WeightError, "model.safetensors")


def test_a_truncated_gguf(gguf, tmp_path):
    data = gguf("mixtral").read_bytes()
    model = meta_model(tiny_config("mixtral"))
    for keep in (3, 20, 500, len(data) // 2, len(data) - 1):
        path = tmp_path / "t.gguf"
        path.write_bytes(data[:keep])
        refused(model, "Mixtral", path, WeightError, "t.gguf")


def test_a_gguf_of_another_family(gguf):
    refused(meta_model(tiny_config("mixtral")), "Mixtral", gguf("qwen3_moe"), KTransformersError, "qwen3moe")


def test_a_family_whose_gguf_names_are_unknown(gguf):
    model = meta_model(AutoConfig.for_model("flex_olmo", hidden_size=64, num_hidden_layers=1, vocab_size=64, num_attention_heads=4,
                                            num_key_value_heads=4, intermediate_size=32, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
                                            eos_token_id=1))  # fmt: skip
    refused(model, alone("experts-cpu"), gguf("qwen3_moe"), UnsupportedError, "flex_olmo")


@pytest.mark.parametrize("when", [0, 4, 12])
def test_ctrl_c_while_loading_leaves_nothing_half_loaded(checkpoint, monkeypatch, when):
    reference, folder = checkpoint("deepseek_v2")
    model = meta_model(tiny_config("deepseek_v2"))
    before = state(model)
    from ktransformers.loaders import ModelWeights

    reads, original = [0], ModelWeights.tensor

    def interrupted(self, *args, **kwargs):
        reads[0] += 1
        if reads[0] > when:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ModelWeights, "tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ktransformers.optimize_and_load(model, "DeepSeek-V2", folder, devices=CPU, progress=False)
    assert state(model) == before
    ktransformers.optimize_and_load(model, "DeepSeek-V2", folder, devices=CPU, progress=False)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_an_operator_that_cannot_be_built_names_its_rule(checkpoint):
    _, folder = checkpoint("mixtral")
    rules = [
        {
            "match": {"name": "lm_head"},
            "replace": {"class": f"{__name__}.Stubborn", "kwargs": {"generate_device": "cpu"}},
        }
    ]
    refused(meta_model(tiny_config("mixtral")), rules, folder, RuleError, "Stubborn for lm_head was not built")


def test_arguments_of_the_wrong_kind_are_named(checkpoint):
    _, folder = checkpoint("mixtral")
    model = meta_model(tiny_config("mixtral"))
    for weights in (3, [], ""):
        refused(model, "Mixtral", weights, WeightError, "weights: found")
    for weights in ("x" * 300, "x" * 5000, "~nosuchuser/x"):
        refused(model, "Mixtral", weights, WeightError, "cannot be looked up")
    for devices in ("cpu", ["cuda"], {"cuda": None}):
        refused(model, "Mixtral", folder, KTransformersError, "devices: found", devices=devices)
    refused(model, "Mixtral", folder, KTransformersError, "default_device: found 0", default_device=0)
    refused(model, "Mixtral", folder, RuleError, "default_device: .*meta", default_device="meta")
    for rule in (None, 3, "", "x" * 300, "x" * 5000, "~nosuchuser/x", b"Mixtral", []):
        refused(model, rule, folder, RuleError, "rule|Rule")
    for no_model in (None, "Mixtral", nn.Linear(2, 2)):
        with pytest.raises(KTransformersError, match="expected a transformers model"):
            ktransformers.optimize_and_load(no_model, "Mixtral", folder)


def test_a_model_is_optimized_once(everything):
    _, model = everything("mixtral")
    with pytest.raises(KTransformersError, match="operators are in it already"):
        ktransformers.optimize_and_load(model, "Mixtral", devices=CPU)


def test_loading_inside_the_meta_context_works(checkpoint):
    reference, folder = checkpoint("deepseek_v2")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        ktransformers.optimize_and_load(model, "DeepSeek-V2", devices=CPU, progress=False)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_a_broken_generation_config_is_found_before_loading(checkpoint, tmp_path):
    shutil.copytree(checkpoint("mixtral")[1], tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    refused(
        meta_model(AutoConfig.from_pretrained(tmp_path / "m")), "Mixtral", None, WeightError, "generation_config.json"
    )


class Anything(BaseInjectedModule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_an_operator_that_names_no_parameter_still_gets_its_devices(checkpoint):
    _, folder = checkpoint("mixtral")
    rules = [{"match": {"name": "lm_head"}, "replace": {"class": f"{__name__}.Anything"}}]
    model = load("mixtral", folder, rules, default_device="cpu")
    assert type(model.lm_head) is Anything and model.lm_head.generate_device == "cpu" == model.hf_device_map["lm_head"]


class Stubborn(BaseInjectedModule):
    def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", *, needed: str, **kwargs):
        super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)


def test_a_family_nobody_mentioned_works_through_traits(tmp_path):
    """OLMoE has no packaged rules and no code here: traits and transformers' own name mapping are enough."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", hidden_size=64, num_hidden_layers=2, vocab_size=96, num_attention_heads=4,
                                  num_key_value_heads=4, intermediate_size=32, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
                                  eos_token_id=None)  # fmt: skip
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    save(reference, tmp_path)
    model = load("olmoe", tmp_path, [*alone("experts-cpu"), *alone("linear-cpu")])
    ids = random_ids(1, 12, vocab=96)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4


def test_importing_starts_nothing():
    import subprocess
    import sys

    code = (
        "import threading, sys; import ktransformers.optimize, ktransformers.engine.generate, ktransformers.local_chat, ktransformers.rules;"
        "import os; print(len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    torch_only = subprocess.run(
        [sys.executable, "-c", code.replace("import ktransformers.optimize, ktransformers.engine.generate, ktransformers.local_chat, "
                                            "ktransformers.rules;", "import torch, transformers, rich, typer, yaml, numpy;")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(ran.stdout) <= int(torch_only.stdout)


def test_the_families_of_the_tests_have_packaged_rules():
    assert set(FAMILIES) < set(DEFAULT_RULES) and callable(optimize.inject)
