"""Every model of transformers that has experts and takes more than text, at a tiny size: the table of a second walk.

`families.SIZES` shrinks the language model, `SIZES` here the parts that see and hear; `FAMILIES` adds what one model
needs besides. A model whose language model is any causal LM (InternVL, LFM2-VL) has an entry for one with experts.
"""

import re

from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import ktransformers.optimize  # noqa: F401  adds model types to transformers
from tests import families

SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "depth": 2,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "encoder_ffn_dim": 48,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "deepstack_visual_indexes": [0, 1],
    "max_position_embeddings": 64,
    "max_source_positions": 64,
    "num_mel_bins": 16,
    "downsample_hidden_size": 16,
    # what the language model is given
    "out_hidden_size": 64,
    "output_dim": 64,
    "text_hidden_size": 64,
    "adapter_out_dim": 64,
}
"""Field -> value, for every configuration of a part that is no language model."""

VOCABULARY = families.SIZES["vocab_size"] + 16
"""Of every tiny language model here: text's, and the tokens that stand for what is seen and heard."""

_TWO_LAYERS = {"mlp_layer_types": ["dense", "sparse"]}
_SAM = {"sam_config": {"mlp_dim": 48, "output_channels": 16, "downsample_channels": [16, 32], "global_attn_indexes": [1], "window_size": 2}}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_NEMOTRON = {"moe_shared_expert_intermediate_size": 48, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}
_MISTRAL4 = {"head_dim": 32}

FAMILIES: dict[str, dict] = {
    "aria": {},
    "deepseek_ocr2": {
        "text_config": {**_TWO_LAYERS, "num_experts_per_tok": 3},
        "vision_config": {**_SAM, "encoder_config": {"layer_types": ["full_attention"] * 2}},
    },
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "sparse"], "per_layer_config": {}, "num_local_experts": 4, "adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 16], "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "gemma4": {"text_config": {**families.FAMILIES["gemma4_text"], "vocab_size_per_layer_input": VOCABULARY}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {
        "text_config": {"num_hidden_layers": 4, "qk_rope_head_dim": 0, "head_dim": 0, "mlp_layer_types": ["dense", *["sparse"] * 3], "index_kpool": 4},
        "vision_config": {"projection_intermediate_size": 48},
    },
    "inkling2": {},
    "inkling_mm_model": {"vision_config": {"n_layers": 5}},
    "internvl": {"text_config": {"model_type": "qwen3_moe"}},
    "kimi_k25": {"projection_hidden_size": 32},
    "lfm2_vl": {"text_config": {"model_type": "lfm2_moe"}},
    "llama4": {"vision_config": {"intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
    "minimax_m3_vl": {"text_config": {"shared_intermediate_size": 48}, "projector_hidden_size": 64, "merged_hidden_size": 256},
    "mistral3": {"text_config": {"model_type": "mistral4", **_MISTRAL4}},
    "mistral4": _MISTRAL4,
    "mistral_large4": {},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 32},
        "projector_hidden_size": 64,
        "out_hidden_size": 64,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    },
    "nemo_speechlm": {
        "text_config": _NEMOTRON,
        "word_timestamp_config": {"vocab_size": 64, "blank_token_id": 63},
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
    },
    "nemotron_h_omni": {
        "text_config": _NEMOTRON,
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 16},
        "projector_hidden_size": 64,
        "vision_hidden_size": 32,
    },
    "qwen3_5_moe": {},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 12},
    "qwen3_vl_moe": {},
    "qwen4_exp": {},
    "step3p7": {"text_config": {**_TWO_LAYERS, "sliding_window": 64}},
    "unlimited_ocr": {"text_config": {**_TWO_LAYERS, "num_key_value_heads": 4}, "vision_config": _SAM},
}
"""Model type -> what its tiny config has besides `SIZES`."""

IMAGES = {
    "glm4v_moe": ((16, 96), ("grid", "types")),
    "kimi_k25": ((16, 3, 4, 4), ("grid",)),
    "llama4": ((1, 3, 16, 16), ()),
    "qwen3_vl_moe": ((16, 96), ("grid", "types")),
}
"""Models that are shown an image of 16x16 pixels, four tokens -> the shape that their processor gives it, and whether
the grid of patches and the tokens' types come with it."""

BY_PART = {
    "qwen3_omni_moe": {
        "thinker_config": {"vision_start_token_id": VOCABULARY - 12},
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 48}},
    },
}
"""Models of several language models, of which one answers: `ktransformers.models.builder` names it."""

_LISTS = "an encoder and a decoder, whose experts are lists of modules in a form of their own; no checkpoint since has it"
WITHOUT = {
    "diffusion_gemma": "writes blocks of text by diffusion, not token by token",
    "nllb-moe": _LISTS,
    "switch_transformers": _LISTS,
}
"""Model types with experts that nothing here takes -> why."""


def types_with_experts() -> list[str]:
    """The model types that take more than text, or have an encoder, and have experts: of their own, or of the language
    model that their default config names."""
    own = families.types_in(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) + families.types_in(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    inside = set(families.types_with_experts())
    return own + [name for name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if name not in own and _text_type(name) in inside]


def _text_type(model_type: str) -> str:
    part = getattr(AutoConfig.for_model(model_type), "text_config", None)
    return getattr(part, "model_type", "")


def known_here() -> list[str]:
    """The models that the installed transformers has."""
    return [name for name in FAMILIES if name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]


def operator_of(model_type: str) -> str:
    """The inner operator that computes a model's experts."""
    return families.operator_of(config_of(model_type).get_text_config(decoder=True).model_type)


def build(model_type: str, vision_config: dict | None = None, **how):
    """A tiny model of the class that takes all that the family can take; `how` goes to `from_config`."""
    changes = {"vision_config": vision_config} if vision_config else {}
    return AutoModelForMultimodalLM.from_config(config_of(model_type, **changes), **how)


def config_of(model_type: str, **overrides):
    """The tiny configuration of a model with several parts; `overrides` are config fields."""
    return _tiny(AutoConfig.for_model(model_type), _merged({**FAMILIES, **BY_PART}.get(model_type, {}), overrides))


def _tiny(default, given: dict):
    """A config of the class of `default`: its language model by families.SIZES, its other parts by SIZES."""
    fields = {name: getattr(default, name) for name in default.sub_configs if getattr(default, name, None) is not None}
    if not fields:
        return type(default)(**families.shrunk(default, given))
    parts = {}
    for name, part in fields.items():
        own = given.get(name, {})
        part = AutoConfig.for_model(own["model_type"]) if "model_type" in own else part
        if name == "text_config":
            made = type(part)(**families.shrunk(part, {"vocab_size": VOCABULARY, **own}))
        elif part.sub_configs:
            made = _tiny(part, own)
        else:
            made = type(part)(**{**{field: size for field, size in SIZES.items() if hasattr(part, field)}, **own})
        parts[name] = made.to_dict()
    return type(default)(**{**_special_tokens(default), **given, **parts})


def _special_tokens(config) -> dict[str, int]:
    """Ids inside the tiny vocabulary, behind those of text, for what stands for an image, a video, a sound."""
    named = (name for name, value in vars(config).items() if re.search(r"_token_(id|index)$", name) and isinstance(value, int))
    return {name: VOCABULARY - 1 - i for i, name in enumerate(sorted(named))}


def _merged(a: dict, b: dict) -> dict:
    both = {name: _merged(a[name], b[name]) for name in a.keys() & b.keys() if isinstance(a[name], dict)}
    return {**a, **b, **both}
