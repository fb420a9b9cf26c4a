"""Attention under the names of rule files for upstream's server. What it computes is in attention.py and gqa.py."""

from ktransformers.operators.attention import KDeepseekV2Attention
from ktransformers.operators.gqa import (  # noqa: F401  rule files name them here
    KGlm4MoeAttention,
    KQwen2MoeAttention,
    KQwen3MoeAttention,
    KQwen3NextAttention,
    KQwen3NextGatedDeltaNet,
    KSmallthinkerAttention,
)


class flashinfer_attn(KDeepseekV2Attention):  # upstream's spelling
    """`KDeepseekV2Attention`, with the cache that transformers gives it."""

    notice = "flashinfer_attn: flashinfer's kernels and paged cache are not built; KDeepseekV2Attention computes"


class deepseek_torch_attn(KDeepseekV2Attention):  # upstream's spelling
    """`KDeepseekV2Attention`, under the name of the server's reference."""
