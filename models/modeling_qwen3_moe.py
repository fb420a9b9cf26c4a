"""Class names that published Qwen3-MoE rule files match on, re-exported from transformers."""

from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

__all__ = [
    "Qwen3MoeAttention",
    "Qwen3MoeDecoderLayer",
    "Qwen3MoeExperts",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeMLP",
    "Qwen3MoeModel",
    "Qwen3MoeRMSNorm",
    "Qwen3MoeRotaryEmbedding",
    "Qwen3MoeSparseMoeBlock",
    "Qwen3MoeTopKRouter",
]
