"""Every mixture-of-experts family of transformers at a tiny size: the table that the walk and the README come from.

`SIZES` shrinks whatever a configuration has under the usual names; `FAMILIES` adds what one family needs beside that.
A model type of transformers that has experts and is in neither table here fails test_every_family.py.
"""

import re
from pathlib import Path

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ktransformers.optimize  # noqa: F401  adds model types to transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # experts, by all the names that families have for them
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_k": 3,
    "moe_topk": 3,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention, indexers
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    # linear attention, state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
}
"""Field -> value, for every configuration that has the field."""

_HYBRID = {"num_hidden_layers": 4}  # the last layer is the first with attention, which a cache cannot be without

FAMILIES: dict[str, dict] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {**_HYBRID, "layer_group_size": 2},
    "beam": {"num_hidden_layers": 4},
    "cohere2_moe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v4": {"num_hash_layers": 1},
    "dots1": {"n_shared_experts": 2},
    "dots3_note": {"vision_config": {"adapter_out_dim": 64}, "audio_config": {"adapter_out_dim": 64}},
    "dots3_note_text": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"num_hidden_layers": 3},
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 3, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "global_head_dim": 16},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {**_HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_HYBRID, "num_hidden_layers": 5},
    "kimi_k2": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {},
    "llama4_text": {"intermediate_size_mlp": 96},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "zero_expert_num": 4},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {**_HYBRID},
    "qwen3_moe": {},
    "qwen3_next": {**_HYBRID},
    "qwen4_exp": {},
    "qwen4_exp_text": {**_HYBRID, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}


ADDED = ["kimi_k2"]
"""Model types that transformers lacks and ktransformers.models adds."""

TORCH_ONLY = {"inkling2_text": "soft-caps gate and up with tanh"}
"""Families whose experts the C library does not compute -> what it lacks. KExpertsTorch computes them."""

ROUTER_NOT_IN_C = {
    "inkling_text": "weighs routed and shared experts in one softmax",
    "llama4": "weighs the input of the experts",
    "llama4_text": "weighs the input of the experts",
    "phimoe": "chooses one expert after the other (sparsemixer)",
    "zaya": "a network of three layers with a state",
}
"""Families whose routers are their own code on the CPU too -> why. All others' are computed in C."""

BLOCK_NOT_IN_C = ROUTER_NOT_IN_C | {
    "axk1": "a norm after the sum",
    "gemma4": "no block: the layer holds router and experts",
    "gemma4_text": "no block: the layer holds router and experts",
    "inkling2_text": "experts that C does not compute",
    "longcat_flash": "experts that pass their input on",
}
"""Families whose blocks of experts are not one call to C -> why. All others' are."""

ATTENTION_NOT_NATIVE = {
    "deepseek_v4": "compressed context", "inkling2_text": "convolutions of keys and values",
    "inkling_text": "convolutions of keys and values", "qwen4_exp": "compressed blocks",
    "qwen4_exp_text": "compressed blocks", "zaya": "convolutions",
}  # fmt: skip
"""Families none of whose attention is a native call on the CPU -> why. Of all others, all softmax attention is."""

DECODER_NOT_NATIVE = ATTENTION_NOT_NATIVE | {
    "axk1": "a norm after the sum of experts", "axk2": "chooses keys by an index", "bailing_hybrid": "linear attention",
    "beam": "a factor of queries that the decoder computes", "deepseek_v32": "chooses keys by an index",
    "dots3_note": "chooses keys by an index", "dots3_note_text": "chooses keys by an index",
    "gemma4": "the layer holds router and experts", "gemma4_text": "the layer holds router and experts",
    "glm_moe_dsa": "chooses keys by an index", "granitemoehybrid": "state spaces",
    "hy_v4": "hyper-connections", "jamba": "state spaces", "kimi_linear": "linear attention",
    "lfm2_moe": "convolutions", "llama4": "weighs the input of the experts",
    "llama4_text": "weighs the input of the experts", "longcat_flash": "two attentions a layer",
    "minimax": "linear attention", "nemotron_h": "state spaces", "phimoe": "a router of its own",
}  # fmt: skip
"""Families whose decoder, all layers and the norm after them, is not one native call on the CPU -> why. All others' is,
but for prompts of those in the next table."""

PROMPT_NOT_NATIVE = {"qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"}
"""Families with delta nets: of them one call takes one more token of each sequence, where none is padding."""

WITHOUT = {
    "dbrx": "experts flattened to [E*I, H] in a layout no later model uses",
    "jetmoe": "routes attention too, through modules of a layout no later model uses",
}
"""Model types with experts that are not the module of transformers' contract -> why nothing here takes them."""

ABSENT = {"smallthinker": "no model of transformers; its repository brings code, which is not run"}
"""Model types that users may ask for and transformers lacks -> what is so."""

_WITHOUT_SIZES = {"dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"rope_theta": 10000.0}}}

PIECES_DIFFER = {"jamba": "its scan starts anew with every piece of more than one token"}
"""Families whose prefill in pieces is not the one-shot prefill in transformers itself -> why."""


PUBLISHED = {
    "deepseek_v3": ["fp8_block"],
    "deepseek_v32": ["fp8_block"],
    "glm4_moe": ["fp8_channel"],
    "kimi_k2": ["fp8_block", "int4_packed"],
    "minimax_m2": ["fp8_block"],
    "mixtral": ["awq4", "gptq4"],
    "qwen3_next": ["fp8_block"],
}
"""Family -> the quantized formats (of tests/loaders/published.py) that its publishers use. Three families have tests of
their own, which are named in tests/support.py: qwen3_moe in every format, gpt-oss and DeepSeek-V4 in MXFP4."""


def known_here() -> list[str]:
    """The families that the installed transformers has."""
    return [name for name in FAMILIES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or name in ADDED]


def operator_of(model_type: str) -> str:
    """The inner operator that computes a family's experts."""
    return "KExpertsTorch" if model_type in TORCH_ONLY else "KExpertsCPU"


def types_with_experts() -> list[str]:
    """The model types of transformers' causal-LM mapping whose modeling file defines or names an experts module."""
    return types_in(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def types_in(mapping: dict) -> list[str]:
    """The model types of one of transformers' mappings whose modeling file defines or names an experts module."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in mapping:
        files = (models / model_type_to_module_name(model_type)).glob("modeling_*.py")
        if any(re.search(r"\bself\.experts = ", file.read_text()) for file in files):
            found.append(model_type)
    return found


def config_of(model_type: str, **overrides):
    """The tiny configuration of a family; `overrides` are config fields."""
    fields = AutoConfig.for_model(model_type).to_dict()
    if "text_config" in fields:
        return AutoConfig.for_model(model_type, text_config=config_of(f"{model_type}_text").to_dict(), **FAMILIES[model_type])
    return AutoConfig.for_model(model_type, **shrunk(AutoConfig.for_model(model_type), overrides))


def shrunk(default, overrides: dict) -> dict:
    """The fields that make a language model of the family of config `default` tiny; `overrides` are more of them."""
    fields, model_type = default.to_dict(), default.model_type
    small = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return {**small, **FAMILIES.get(model_type, {}), **_WITHOUT_SIZES.get(model_type, {}), **overrides}
