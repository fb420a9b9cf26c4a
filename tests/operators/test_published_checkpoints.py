"""Quantized checkpoints as published, loaded into models: logits equal those of the same numbers, dequantized by
transformers where it can."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import native, optimize_and_load
from ktransformers.errors import NativeError, RuleError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.operators import base_operator
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.inner_ops import stored_problem
from tests import families
from tests.loaders import published
from tests.tiny import meta_model, random_ids, randomize, relative_error

EXPERTS = "ktransformers.operators.experts.KTransformersExperts"
LINEAR = "ktransformers.operators.linear.KTransformersLinear"
CPU = {"generate_device": "cpu", "prefill_device": "cpu"}


def rules(op="KExpertsTorch", **more):
    """Experts by `op`, linear layers by the C library where it computes their type."""
    return [
        {"match": {"trait": "experts"}, "replace": {"class": EXPERTS, "kwargs": {"generate_op": op, **CPU, **more}}},
        {"match": {"name": r"(?<!o_a_proj)(?<!weights_proj)$", "class": "torch.nn.Linear"}, "replace": {"class": LINEAR, "kwargs": CPU}},
    ]


NO_OPERATORS = [{"match": {"name": "^model$"}, "replace": {"class": "default", "kwargs": CPU}}]


BOTH = pytest.mark.parametrize("op", ["KExpertsTorch", "KExpertsCPU"])


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(1, 0.1) if "norm" in name else tensor.normal_(0, 0.1)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def same_logits(loaded, truth):
    ids = random_ids(2, 9, vocab=80)
    assert relative_error(logits(loaded, ids), logits(truth, ids)) < 2e-5


# --- gpt-oss: stacked blocks and scales, biases, gate and up in turn -----------------------------------------------------


def gpt_oss_config():
    return AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=80, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip


def gpt_oss(folder):
    """(folder, model with the numbers that transformers makes of it)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, rng = random_model(gpt_oss_config()), np.random.default_rng(0)
    state, tensors = model.state_dict(), {}
    for name, tensor in state.items():
        if tensor.dim() != 3:
            tensors[name] = tensor
            continue
        e, k, n = tensor.shape
        blocks = torch.from_numpy(rng.integers(0, 256, (e, n, k // 32, 16)).astype(np.uint8))
        scales = torch.from_numpy(rng.integers(119, 124, (e, n, k // 32)).astype(np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    return write(folder, tensors, {"quant_method": "mxfp4"}), model


@BOTH
def test_gpt_oss(op, tmp_path, exact):
    folder, truth = gpt_oss(tmp_path)
    loaded = optimize_and_load(meta_model(gpt_oss_config()), rules(op), folder, progress=False)
    same_logits(loaded, truth)


def test_gpt_oss_experts_are_views_of_the_blocks(tmp_path):
    """gate is the even and up the odd rows, [I, H] each, without a copy; biases come apart in the same way."""
    folder, truth = gpt_oss(tmp_path)
    weights = bind(open_weights(folder), meta_model(gpt_oss_config()))
    key, module = "model.layers.1.mlp.experts", truth.model.layers[1].mlp.experts
    assert not weights.can_pack(f"{key}.gate_up_proj") and weights.experts_problem(key) == ""
    assert weights.methods(f"{key}.down_proj") == ["MXFP4"]
    experts = weights.experts(key)
    mapped = weights.files.packed("model.norm.weight").data.untyped_storage().data_ptr()
    for e in range(4):
        rows = module.gate_up_proj[e].T
        for packed, value in (
            (experts.gate[e], rows[0::2]),
            (experts.up[e], rows[1::2]),
            (experts.down[e], module.down_proj[e].T),
        ):
            assert torch.equal(packed.dequantize(), value) and packed.data.untyped_storage().data_ptr() == mapped
        assert experts.gate[e].stride == 2 * experts.down[e].shape[0] // 2 == 64 and experts.gate[e].scale_stride == 4
    assert torch.equal(experts.gate_bias, module.gate_up_proj_bias[:, 0::2]) and experts.up_bias.is_contiguous()
    assert torch.equal(experts.up_bias, module.gate_up_proj_bias[:, 1::2])
    assert torch.equal(experts.down_bias, module.down_proj_bias)


@BOTH
def test_gpt_oss_dequantized(op, tmp_path, exact):
    """Its bf16 form stores columns, so that rows of it are a copy; that is said once."""
    truth = random_model(gpt_oss_config())
    folder = write(tmp_path, {name: tensor.bfloat16() for name, tensor in truth.state_dict().items()})
    truth.load_state_dict({name: tensor.bfloat16().float() for name, tensor in truth.state_dict().items()})
    weights = bind(open_weights(folder), meta_model(gpt_oss_config()))
    key = "model.layers.0.mlp.experts"
    assert weights.experts(key).copied and weights.experts_problem(key) == "" and not weights.can_pack(f"{key}.down_proj")
    base_operator._told.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = gpt_oss_config()
        config.dtype = torch.float32  # else the model would be in the checkpoint's bfloat16
        loaded = optimize_and_load(meta_model(config), rules(op), folder, progress=False)
    assert sum("a copy in memory" in str(warning.message) for warning in told) == (op == "KExpertsCPU")
    same_logits(loaded, truth)


# --- DeepSeek-V4: names of its own, FP8 with powers of two, FP4 experts ----------------------------------------------------


def deepseek_v4_config():
    return AutoConfig.for_model(
        "deepseek_v4", hidden_size=64, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        q_lora_rank=32, o_lora_rank=32, o_groups=2, n_routed_experts=4, num_experts_per_tok=2, vocab_size=80,
        index_n_heads=2, index_head_dim=16, index_topk=8, num_nextn_predict_layers=1, max_position_embeddings=512,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"], bos_token_id=1, eos_token_id=2, swiglu_limit=0.5,
    )  # fmt: skip


@BOTH
def test_deepseek_v4(op, tmp_path, exact):
    """As published: `layers.0.ffn.experts.0.w1.weight` int8 with `.scale` e8m0, attention in FP8, an MTP layer."""
    model, rng = random_model(deepseek_v4_config()), np.random.default_rng(0)
    model.model.layers[0].mlp.gate.tid2eid.copy_(torch.randint(0, 4, (80, 2)))
    model.save_pretrained(tmp_path / "hf")
    tensors, plain = {}, {}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        short = name.removeprefix("model.")
        if re.search(r"\.(w1|w2|w3|wq_a|wq_b|wkv|wo_b)\.weight$", name) and "compressor" not in name:
            make = published.mxfp4 if ".experts." in name else published.fp8_block_ue8m0
            parts, values = make(*tensor.shape, rng)
            tensors |= {short.removesuffix("weight") + part: t for part, t in parts.items()}
            plain[name] = torch.from_numpy(values)
        else:
            tensors[short] = plain[name] = tensor
    tensors["mtp.0.attn.wq_a.weight"] = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)  # not built by transformers
    truth = optimize_and_load(
        meta_model(deepseek_v4_config()), NO_OPERATORS, write(tmp_path / "plain", plain), progress=False
    )
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    folder = write(tmp_path / "packed", tensors, config)
    loaded = optimize_and_load(meta_model(deepseek_v4_config()), rules(op, method="MXFP4"), folder, progress=False)
    same_logits(loaded, truth)
    assert loaded.gguf_loader.experts("model.layers.1.mlp.experts").gate[3].type.name == "F4_E2M1"


# --- a family like most, in every format ---------------------------------------------------------------------------------


def qwen3_moe_config():
    return AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=80,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=32,
    )  # fmt: skip


def checkpoint(folder, form):
    """(folder, model with the numbers that the format's definition says)."""
    model, rng = random_model(qwen3_moe_config()), np.random.default_rng(0)
    make, _, _, config = published.FORMATS[form]
    model.save_pretrained(folder)
    tensors, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(r"_proj\.weight$", name):
            parts, values = make(*tensor.shape, rng)
            tensors |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
            plain[name] = torch.from_numpy(np.ascontiguousarray(values)).float()
        else:
            tensors[name] = plain[name] = tensor
    truth = optimize_and_load(
        meta_model(qwen3_moe_config()), NO_OPERATORS, write(folder / "plain", plain), progress=False
    )
    return write(folder, tensors, config), truth


@pytest.mark.parametrize("form", published.FORMATS)
def test_every_format_runs(form, tmp_path, exact):
    """The torch operators and the C library compute every format, and so does a model without rules."""
    folder, truth = checkpoint(tmp_path, form)
    method = published.FORMATS[form][2]
    for rule in (rules("KExpertsTorch", method=method), rules("KExpertsCPU", method=method), NO_OPERATORS):
        same_logits(optimize_and_load(meta_model(qwen3_moe_config()), rule, folder, progress=False), truth)


# --- families in the formats that their publishers use --------------------------------------------------------------------

QUANTIZED = re.compile(r"\.layers\.\d+\..*((?<!weights)_proj|_proj_with_mqa|\.w[123])\.weight$")


def published_family(model_type, form, folder):
    """(folder, model with the numbers that the format's definition says): experts and projections in a format."""
    torch.manual_seed(0)
    model, rng = AutoModelForCausalLM.from_config(families.config_of(model_type)).eval(), np.random.default_rng(0)
    make, _, _, config = published.FORMATS[form]
    randomize(model).save_pretrained(folder / "hf")
    tensors, plain = {}, {}
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        whole = tensor.dim() == 2 and all(size % 32 == 0 for size in tensor.shape)
        if QUANTIZED.search(name) and whole:
            parts, values = make(*tensor.shape, rng)
            tensors |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
            plain[name] = torch.from_numpy(np.ascontiguousarray(values)).float()
        else:
            tensors[name] = plain[name] = tensor
    truth = optimize_and_load(meta_model(model.config), NO_OPERATORS, write(folder / "plain", plain), progress=False)
    return write(folder, tensors, config), truth


FORMS = [(family, form) for family, forms in families.PUBLISHED.items() for form in forms]


@pytest.mark.parametrize(("model_type", "form"), FORMS)
def test_a_family_as_it_is_published(model_type, form, tmp_path, exact):
    """Under the default rules, under those that the chat takes, and with the linear layers packed too."""
    folder, truth = published_family(model_type, form, tmp_path)
    packed = rules("KExpertsCPU", method=published.FORMATS[form][2])
    for rule in ("Default", DEFAULT_RULES.get(model_type, "Default"), packed):
        loaded = optimize_and_load(meta_model(truth.config), rule, folder, devices={"cuda": "cpu"}, progress=False)
        same_logits(loaded, truth)
        layer = next(module for module in loaded.modules() if isinstance(module, KTransformersExperts))
        assert loaded.gguf_loader.quant_type(f"{layer.key}.down_proj") == published.FORMATS[form][1]


ROUNDED = [form for form in published.FORMATS if "fp8" not in form]
"""Formats that meet activations of 8 bits, unless in exact mode."""


@pytest.mark.parametrize("form", ROUNDED)
def test_rounded_activations_stay_near(form, tmp_path):
    """As users run it: experts and a linear layer, with one token and with many."""
    folder, truth = checkpoint(tmp_path, form)
    loaded = optimize_and_load(meta_model(qwen3_moe_config()), rules("KExpertsCPU"), folder, progress=False)
    torch.manual_seed(0)
    for tokens, error in ((1, 0.04), (40, 0.015)):
        hidden, ids, w = torch.randn(tokens, 64), torch.randint(0, 4, (tokens, 2)), torch.rand(tokens, 2)
        for found, expected in (
            [m.model.layers[1].mlp.experts(hidden, ids, w) for m in (loaded, truth)],
            [m.model.layers[0].self_attn.q_proj(hidden) for m in (loaded, truth)],
        ):
            assert (found - expected).abs().mean() < error * expected.abs().mean()


def test_a_method_that_is_not_the_checkpoints(tmp_path):
    """Refused before anything is loaded, with what was found."""
    folder, _ = checkpoint(tmp_path, "int4_packed")
    with pytest.raises(RuleError, match=r"method: FP8 asks for experts stored so, found AMXINT4, RAWINT4 \(I4\)"):
        optimize_and_load(meta_model(qwen3_moe_config()), rules(method="FP8"), folder, progress=False)


@pytest.mark.parametrize("form", ["fp8_block", "gptq4_act_order"])
def test_a_quantized_checkpoint_becomes_a_gguf(form, tmp_path):
    """`quantize` reads what the loaders read: an F32 file of such a checkpoint computes the same."""
    folder, truth = checkpoint(tmp_path / "hf", form)
    qwen3_moe_config().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": published.FORMATS[form][3]}
    (folder / "config.json").write_text(json.dumps(config))
    quantize_folder(folder, tmp_path / "out.gguf", "F32")
    same_logits(
        optimize_and_load(meta_model(qwen3_moe_config()), rules(), tmp_path / "out.gguf", progress=False), truth
    )


@pytest.mark.parametrize(
    "make, columns, words",
    [
        (published.int8_row, 48, "I8 of 48 columns with one scale for 48"),
        (lambda n, k, rng: published._packed_ints(n, k, rng, 4, 8), 64, "I4 of 64 columns with one scale for 8"),
        (lambda n, k, rng: published._packed_ints(n, k, rng, 4, 16, asymmetric=True), 64, "with one scale for 16"),
        (lambda n, k, rng: published._packed_ints(n, k, rng, 4, 16), 64, ""),
        (published.fp8_channel, 48, ""),
        (published.gptq8, 64, ""),
    ],
)
def test_groups_that_c_does_not_compute_are_said_before_loading(make, columns, words, tmp_path):
    """And what is not said, it computes."""
    parts, _ = make(8, columns, np.random.default_rng(0))
    files = open_weights(write(tmp_path, {f"x.{name}": tensor for name, tensor in parts.items()}))
    problem = stored_problem(SimpleNamespace(infos=lambda name: [files.info(name)]), ["x.weight"], "KLinearTorch")
    if words:
        assert words in problem and problem.endswith("use KLinearTorch")
        with pytest.raises(NativeError):
            native.Linear(files.packed("x.weight"))(torch.zeros(1, columns))
    else:
        assert problem == ""
        assert torch.equal(native.dequantize(files.packed("x.weight")), files.tensor("x.weight"))
