"""Class names that published DeepSeek-V3 rule files match on, re-exported from transformers."""

from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3ForCausalLM,
    DeepseekV3MLP,
    DeepseekV3Model,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)

# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
DeepseekV3YarnRotaryEmbedding = DeepseekV3RotaryEmbedding
MoEGate = DeepseekV3TopkRouter

__all__ = [
    "DeepseekV3Attention",
    "DeepseekV3DecoderLayer",
    "DeepseekV3Experts",
    "DeepseekV3ForCausalLM",
    "DeepseekV3MLP",
    "DeepseekV3MoE",
    "DeepseekV3Model",
    "DeepseekV3RMSNorm",
    "DeepseekV3RotaryEmbedding",
    "DeepseekV3TopkRouter",
    "DeepseekV3YarnRotaryEmbedding",
    "MoEGate",
]
