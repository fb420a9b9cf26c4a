"""Tiny random models of the five families, built the way transformers builds them: truth for the tests.

Sizes are small enough that a forward takes milliseconds, odd enough that swapped dimensions do not fit, and
the weights large enough that every part of a layer matters to the logits.
"""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,  # transformers' rotary embedding reads this one: it is qk_rope_head_dim
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}

FAMILIES: dict[str, dict] = {
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**_MLA, "routed_scaling_factor": 2.5},
    "qwen2_moe": {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_GQA, **_EXPERTS, "norm_topk_prob": True},
    "mixtral": {**_GQA, "num_local_experts": 8, "num_experts_per_tok": 2},
}

_DSA = {**_MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
_DELTA_NET = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_SPARSE = {**_GQA, "num_local_experts": 8, "num_experts_per_tok": 2}

MORE: dict[str, dict] = {
    "llama": _GQA,
    "deepseek_v32": _DSA,
    "deepseek_v4": {**_SPARSE, "moe_intermediate_size": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "index_head_dim": 16,
                    "index_n_heads": 2, "index_topk": 64, "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 8},
    "glm4_moe": {**_GQA, **_EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _DSA,
    "gpt_oss": {**_SPARSE, "intermediate_size": 32},
    "llama4_text": {**_SPARSE, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
    "minimax_m2": _SPARSE,
    "qwen3_5_moe_text": {**_GQA, **_EXPERTS, **_DELTA_NET, "num_hidden_layers": 4, "shared_expert_intermediate_size": 48},
    "qwen3_next": {**_GQA, **_EXPERTS, **_DELTA_NET, "num_hidden_layers": 4, "shared_expert_intermediate_size": 48},
}  # fmt: skip
"""Families of packaged and published rule files beside the five that every test goes through."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def tiny_config(family: str, **overrides):
    """The configuration of a tiny `family` model; `overrides` are config fields."""
    return AutoConfig.for_model(family, **{**_COMMON, **{**FAMILIES, **MORE}[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides):
    """A random fp32 model in eval mode with eager attention and experts: transformers' plainest path."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **overrides), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.dim() >= 2:
                tensor.normal_(
                    0, 1.2 * tensor.shape[-1] ** -0.5
                )  # keeps activations near 1 through every layer
            elif "inv_freq" not in name:
                tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(0, 0.1)
    return model


def meta_model(config):
    """The model that `optimize_and_load` is given: right shapes, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def save(model, folder: Path) -> Path:
    """Write the checkpoint as its publisher would."""
    model.save_pretrained(folder)
    return folder


def random_ids(batch: int, length: int, seed: int = 1, vocab: int = 128) -> torch.Tensor:
    """Token ids int64 [batch, length], none of them the padding id 0."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
