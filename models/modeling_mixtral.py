"""Class names that published Mixtral rule files match on, re-exported from transformers."""

from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralForCausalLM,
    MixtralModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

__all__ = [
    "MixtralAttention",
    "MixtralDecoderLayer",
    "MixtralExperts",
    "MixtralForCausalLM",
    "MixtralModel",
    "MixtralRMSNorm",
    "MixtralRotaryEmbedding",
    "MixtralSparseMoeBlock",
    "MixtralTopKRouter",
]
