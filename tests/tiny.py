"""Tiny random models of five families, and of any other by families.py, built the way transformers builds them: truth for the tests.

Sizes are small enough that a forward takes milliseconds, odd enough that swapped dimensions do not fit, and
the weights large enough that every part of a layer matters to the logits.
"""

import copy
import re
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)

from tests import families, multimodal

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
    """The configuration of a tiny model of any family; `overrides` are config fields."""
    if family not in FAMILIES:
        table = families if family in families.FAMILIES or family not in multimodal.FAMILIES else multimodal
        return table.config_of(family, **overrides)
    return AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides):
    """A random fp32 model in eval mode with eager attention and experts: transformers' plainest path."""
    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    return randomize(build(config, attn_implementation="eager", experts_implementation="eager").eval())


def build(config, **how):
    """A causal LM where transformers has one for `config`, else the class that takes more than text."""
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    return auto.from_config(config, **how)


FORMULAS = re.compile(r"_decay$|slope_rate$")
"""Saved tensors that are tables of a formula (MiniMax's): other numbers would contradict each other."""


def randomize(model):
    """Fill everything that a checkpoint holds with numbers that keep activations near 1 through every layer."""
    saved = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in saved or not tensor.is_floating_point() or FORMULAS.search(name):
                continue
            if tensor.dim() >= 2:
                tensor.normal_(0, 1.2 * tensor.shape[-1] ** -0.5)
            else:
                tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(0, 0.1)
    return model


def meta_model(config):
    """The model that `optimize_and_load` is given: right shapes, no memory."""
    with torch.device("meta"):
        return build(copy.deepcopy(config))


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
