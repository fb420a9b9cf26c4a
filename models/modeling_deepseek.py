"""Class names that published DeepSeek-V2 rule files match on, re-exported from transformers."""

from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2Experts,
    DeepseekV2ForCausalLM,
    DeepseekV2MLP,
    DeepseekV2Model,
    DeepseekV2RMSNorm,
    DeepseekV2RotaryEmbedding,
    DeepseekV2TopkRouter,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe as DeepseekV2MoE

# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
DeepseekV2YarnRotaryEmbedding = DeepseekV2RotaryEmbedding
MoEGate = DeepseekV2TopkRouter

__all__ = [
    "DeepseekV2Attention",
    "DeepseekV2DecoderLayer",
    "DeepseekV2Experts",
    "DeepseekV2ForCausalLM",
    "DeepseekV2MLP",
    "DeepseekV2MoE",
    "DeepseekV2Model",
    "DeepseekV2RMSNorm",
    "DeepseekV2RotaryEmbedding",
    "DeepseekV2TopkRouter",
    "DeepseekV2YarnRotaryEmbedding",
    "MoEGate",
]
