"""Every packaged rule file and every name of one, on a tiny model of the family: transformers' logits and tokens."""

import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from ktransformers.optimize_rules import NAMES

from ktransformers import optimize_and_load
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.rules.plan import packaged_rules
from tests.tiny import meta_model, random_ids, relative_error

MODELS = {
    "DeepSeek-V2": ("deepseek_v2", {}),
    "DeepSeek-V2-Lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "DeepSeek-R1": ("deepseek_v3", {}),
    "DeepSeek-V3.2": ("deepseek_v32", {}),
    "DeepSeek-V4": ("deepseek_v4", {}),
    "GLM-4": ("glm4_moe", {}),
    "GLM-4.5V": ("glm4v_moe", {}),
    "GLM-4.7-Flash": ("glm4_moe_lite", {}),
    "GLM-5": ("glm_moe_dsa", {}),
    "gpt-oss": ("gpt_oss", {}),
    "Kimi-K2": ("kimi_k2", {"n_group": 1, "topk_group": 1}),
    "Kimi-K2.5": ("kimi_k25", {}),
    "Llama-4": ("llama4_text", {}),
    "MiniMax-M2": ("minimax_m2", {}),
    "Mixtral": ("mixtral", {}),
    "Moonlight": ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Qwen3-Next": ("qwen3_next", {}),
    "Qwen3-Omni-MoE": ("qwen3_omni_moe_thinker", {}),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", {}),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", {}),
}
"""Name of packaged rules -> the tiny model that stands for it: a family and what its config differs in."""


@pytest.mark.parametrize("name", NAMES)
def test_packaged_rules_compute_what_transformers_computes(checkpoint, name):
    family, overrides = MODELS[name]
    reference, folder = checkpoint(family, **overrides)
    model = optimize_and_load(meta_model(reference.config), name, folder, devices={"cuda": "cpu"}, progress=False)
    taken = {type(m).__name__ for m in model.modules() if isinstance(m, BaseInjectedModule)}
    assert {"KTransformersExperts", "KTransformersLinear", "DecoderModel"} <= taken
    assert ("KDeepseekV2Attention" in taken) is (NAMES[name] == "MLA")
    ids = random_ids(2, 17)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    greedy = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), reference.generate(ids, **greedy))


def test_every_name_is_tested_and_every_default_is_there():
    assert set(MODELS) == set(NAMES) and set(NAMES.values()) <= set(packaged_rules())
    assert set(DEFAULT_RULES.values()) <= set(packaged_rules())
    for name, (family, _) in MODELS.items():
        assert NAMES[DEFAULT_RULES[family]] == NAMES[name], name
