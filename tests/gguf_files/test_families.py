"""Every GGUF architecture that holds a mixture of experts transformers can build: a tiny model written in llama.cpp's
layout and read back computes the same logits."""

import re
from collections import defaultdict
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import config_from_gguf, native, optimize_and_load
from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.families import READERS
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from ktransformers.loaders.gguf_names import FAMILIES
from ktransformers.operators.experts import KTransformersExperts
from tests.tiny import meta_model, random_ids, relative_error

_BASE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip
_MOE = _BASE | dict(moe_intermediate_size=32)
_MLA = _MOE | dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    head_dim=8, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
)  # fmt: skip
_LINEAR = _MOE | dict(
    num_experts=4, shared_expert_intermediate_size=32, num_hidden_layers=4, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4,
)  # fmt: skip
_SIGMOID = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
_MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2)

CONFIGS: dict[str, dict] = {
    "deepseek_v2": _MLA | dict(topk_method="group_limited_greedy"),
    "deepseek_v3": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA | dict(index_n_heads=4, index_head_dim=64, index_topk=8, num_hidden_layers=2,
                               qk_rope_head_dim=16, head_dim=16, indexer_types=["full", "full"], mlp_layer_types=["dense", "sparse"]),
    "glm4_moe": _MOE | _SIGMOID | dict(use_qk_norm=True, attention_bias=True),
    "qwen2_moe": _MOE | dict(num_experts=4, shared_expert_intermediate_size=48, mlp_only_layers=[1]),
    "qwen3_moe": _MOE | dict(num_experts=4, norm_topk_prob=True),
    "qwen3_next": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25,
                                                            mrope_section=[1, 1, 0], mrope_interleaved=True)),
    "mixtral": _BASE | dict(num_local_experts=4),
    "llama4_text": _BASE | dict(num_local_experts=4, intermediate_size_mlp=80, num_hidden_layers=4, interleave_moe_layer_step=2),
    "phimoe": _BASE | dict(num_local_experts=4, attention_bias=True, lm_head_bias=True),
    "olmoe": _BASE | dict(num_experts=4, num_key_value_heads=4),
    "granitemoe": _BASE | dict(num_local_experts=4, logits_scaling=2.0, residual_multiplier=0.5),
    "granitemoeshared": _BASE | dict(num_local_experts=4, shared_intermediate_size=40),
    "granitemoehybrid": _BASE | _MAMBA2 | dict(num_local_experts=4, shared_intermediate_size=40,
                                               layer_types=["mamba", "attention", "mamba"]),
    "dots1": _MOE | _SIGMOID | dict(num_key_value_heads=4, layer_types=["full_attention"] * 3),
    "ernie4_5_moe": _MOE | dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "hunyuan_v1_moe": _BASE | dict(num_experts=4, moe_topk=2),
    "exaone_moe": _MOE | dict(num_experts=4, num_shared_experts=1, n_group=1, topk_group=1, sliding_window=16,
                              first_k_dense_replace=1, layer_types=["sliding_attention", "full_attention", "full_attention"]),
    "afmoe": _MOE | dict(num_experts=4, num_shared_experts=1, num_dense_layers=1, sliding_window=16, num_hidden_layers=4,
                         mup_enabled=True, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "lfm2_moe": _MOE | dict(num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
                            tie_word_embeddings=True),
    "minimax_m2": _BASE | dict(num_local_experts=4),
    "mimo_v2_flash": _MOE | dict(n_routed_experts=4, n_group=1, topk_group=1, v_head_dim=12,
                                 rope_parameters={kind: dict(rope_type="default", rope_theta=theta, partial_rotary_factor=0.5)
                                                  for kind, theta in (("full_attention", 1e5), ("sliding_attention", 1e4))},
                                 layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "gpt_oss": _BASE | dict(num_local_experts=4, sliding_window=16),
    "kimi_linear": _MLA | dict(num_experts=4, linear_head_dim=16, linear_num_heads=4, num_experts_per_token=2, q_lora_rank=None,
                               layer_types=["linear_attention", "full_attention", "linear_attention"],
                               mlp_layer_types=["dense", "sparse", "sparse"]),
    "jamba": _BASE | dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                          use_mamba_kernels=False, mamba_d_state=8),
    "nemotron_h": _MOE | dict(n_routed_experts=4, n_group=1, topk_group=1, moe_shared_expert_intermediate_size=40,
                              mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, conv_kernel=4,
                              use_mamba_kernels=False, layers_block_type=["mamba", "attention", "moe"]),
}  # fmt: skip


def model_of(model_type, **changes):
    """A random model in eval mode with eager attention and experts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() >= 2 and "A_log" not in name:
                tensor.normal_(0, 1.2 * tensor.shape[-1] ** -0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Per model type: transformers' model, and the folder with its files by type."""
    made, paths = {}, defaultdict(dict)

    def make(model_type, kind="F32", split=0):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = model_of(model_type)
            model.save_pretrained(folder / "hf")
            made[model_type] = model, folder
        model, folder = made[model_type]
        if (kind, split) not in paths[model_type]:
            done = quantize_folder(folder / "hf", folder / f"{kind}-{split}.gguf", kind, split)
            paths[model_type][kind, split] = Path(done["files"][0])
        return model, paths[model_type][kind, split]

    return make


NO_OPERATORS = [{"match": {"name": "^model$"}, "replace": {"class": "default", "kwargs": {"generate_device": "cpu"}}}]


def load(config, path):
    return optimize_and_load(meta_model(config), NO_OPERATORS, path, progress=False)


def error(found, expected, length=13):
    ids = random_ids(2, length, vocab=96)
    with torch.no_grad():
        return relative_error(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_round_trip(written, model_type):
    """F32: every tensor to the last bits of exp and log, and the logits."""
    model, path = written(model_type)
    loaded = load(model.config, path)
    for name, tensor in model.state_dict().items():
        assert relative_error(loaded.state_dict()[name], tensor) < 1e-5, name
    assert error(loaded, model) < 1e-4


@pytest.mark.parametrize("model_type", CONFIGS)
def test_half_quantized_and_split(written, model_type):
    """F16 and Q8_0 stay near, and a split set is the same as one file."""
    model, path = written(model_type, "F16")
    for name, tensor in load(model.config, path).state_dict().items():
        assert relative_error(tensor, model.state_dict()[name]) < 1e-3, name
    one, many = written(model_type, "Q8_0")[1], written(model_type, "Q8_0", 7)[1]
    assert "00001-of" in str(many)
    whole, parts = load(model.config, one), load(model.config, many)
    assert error(parts, whole) == 0
    for name, tensor in whole.state_dict().items():
        assert relative_error(tensor, model.state_dict()[name]) < 0.02, name


@pytest.fixture
def exact():
    """The C library in fp32 throughout: rounded activations make other choices of experts in models this small."""
    native.set_exact(True)
    yield
    native.set_exact(False)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_experts_compute_from_the_files_bytes(written, exact, model_type):
    """With the rule file that fits any family, in C, from F32 and from Q8_0."""
    for kind in ("F32", "Q8_0"):
        model, path = written(model_type, kind)
        loaded = optimize_and_load(meta_model(model.config), "Default", path, devices={"cuda": "cpu"}, progress=False)
        assert any(isinstance(module, KTransformersExperts) for module in loaded.modules())
        assert error(loaded, load(model.config, path)) < 1e-4


def test_every_architecture_of_the_package_is_here_or_refused_on_purpose():
    """What the gguf package knows with experts in it, and what is not read, each with the reason."""
    tensors = {gguf.MODEL_TENSOR.FFN_UP_EXP, gguf.MODEL_TENSOR.FFN_DOWN_EXP, gguf.MODEL_TENSOR.FFN_GATE_UP_EXP}
    with_experts = {gguf.MODEL_ARCH_NAMES[a] for a, known in gguf.MODEL_TENSORS.items() if tensors & set(known)}
    refused = {
        # no causal language model with an experts module in transformers
        "deci", "grok", "nomic-bert-moe", "qwen3vlmoe", "minicpm", "arctic", "deepseek", "deepseek2-ocr", "bailingmoe",
        "bailingmoe2", "smallthinker", "llada-moe", "grovemoe", "rnd1", "mistral3", "mistral4", "step35", "llama-embed",
        # experts of another form: one tensor for all, or behind a second router
        "dbrx", "gemma4",
    }  # fmt: skip
    assert with_experts - refused == set(FAMILIES)
    assert {t for family in FAMILIES.values() for t in family.model_types} == set(CONFIGS)


def test_layers_that_predict_more_tokens_are_left_alone(written, tmp_path):
    """mimo2's files count them and hold them; the config that transformers has does not know them."""
    model, path = written("mimo_v2_flash")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mimo2")
    for key, held in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = 4 if key == "mimo2.block_count" else held.contents()
            writer.add_key_value(key, value, held.types[0], held.types[1] if len(held.types) > 1 else None)
    writer.add_nextn_predict_layers(1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.3.nextn.eh_proj.weight", reader.tensors[0].data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert error(load(model.config, tmp_path / "x.gguf"), model) < 1e-4
    assert config_from_gguf(tmp_path / "x.gguf").num_hidden_layers == 3


def test_an_architecture_that_is_not_mapped_is_one_error(written, tmp_path):
    from tests.loaders.small_files import edit_gguf

    path = edit_gguf(written("qwen3_moe")[1], tmp_path / "x.gguf", arch="arctic")
    with pytest.raises(UnsupportedError, match="architecture 'arctic' is not known.*safetensors"):
        bind(open_weights(path), meta_model(written("qwen3_moe")[0].config))


# --- the config from the file's metadata ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", READERS)
def test_the_config_comes_back(written, arch):
    """A model built from the file alone computes what the original does."""
    for model_type in FAMILIES[arch].model_types:
        if model_type == "glm4_moe_lite":
            continue  # such files say what DeepSeek-V3's say
        model, path = written(model_type)
        config = config_from_gguf(path)
        assert config.model_type == model_type
        assert error(load(config, path), model) < 1e-4


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, beta_fast=32.0,
            beta_slow=1.0)  # fmt: skip


@pytest.mark.parametrize("scales", [{}, dict(mscale=1.0, mscale_all_dim=1.0), dict(mscale=0.707, mscale_all_dim=0.707),
                                    dict(mscale=1.0, mscale_all_dim=0.8), dict(mscale_all_dim=0.8)])  # fmt: skip
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm_moe_dsa"])
def test_yarn_comes_back_where_attention_is_latent(tmp_path, model_type, scales):
    """Angles, the factor of sine and cosine, and the scale of attention's scores, of which files say the logarithm's."""
    model = model_of(model_type, rope_parameters=YARN | scales)
    model.save_pretrained(tmp_path / "hf")
    quantize_folder(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    loaded = load(config_from_gguf(tmp_path / "m.gguf"), tmp_path / "m.gguf")
    found, expected = loaded.model.rotary_emb, model.model.rotary_emb
    assert torch.allclose(found.inv_freq, expected.inv_freq) and error(loaded, model, 60) < 1e-4
    assert found.attention_scaling == pytest.approx(expected.attention_scaling, rel=1e-6)


def test_configs_that_are_not_told_are_one_error(written, tmp_path):
    untold = next(f.model_types[0] for f in FAMILIES.values() if f.arch not in READERS)
    with pytest.raises(UnsupportedError, match=r"cannot be told from its metadata.*--model_path"):
        config_from_gguf(written(untold)[1])


def test_a_number_that_is_missing_is_named(written, tmp_path):
    path = written("qwen3_moe")[1]
    broken = tmp_path / "x.gguf"
    broken.write_bytes(re.sub(rb"qwen3moe\.block_count", b"qwen3moe.block_cuont", path.read_bytes()))
    with pytest.raises(WeightError, match="qwen3moe.block_count is missing"):
        config_from_gguf(broken)
