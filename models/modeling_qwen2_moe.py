"""Class names that published Qwen2-MoE rule files match on, re-exported from transformers."""

from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeExperts,
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeModel,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)

__all__ = [
    "Qwen2MoeAttention",
    "Qwen2MoeDecoderLayer",
    "Qwen2MoeExperts",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeMLP",
    "Qwen2MoeModel",
    "Qwen2MoeRMSNorm",
    "Qwen2MoeRotaryEmbedding",
    "Qwen2MoeSparseMoeBlock",
    "Qwen2MoeTopKRouter",
]
