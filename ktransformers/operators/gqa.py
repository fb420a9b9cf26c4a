"""Attention that is right as transformers has it (grouped queries, gated delta nets): placed and loaded, no more.

Its projections are children, so other rules may replace them; which kernel runs is `attn_implementation`'s to say.
Rule files name these classes as ``operators.attention.*`` and ``operators.balance_serve_attention.*``.
"""

from torch import nn

from ktransformers.models.traits import TRAITS
from ktransformers.operators.base_operator import FamilyOperator


class GQAttention(FamilyOperator):
    """hidden [B, S, H] -> ([B, S, H], weights or None), as the family computes it."""

    replaces = "attention of grouped queries (q_proj, k_proj, v_proj and o_proj)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["attention"](module) and not TRAITS["mla"](module)


class KLlamaAttention(GQAttention):
    """Llama, InternLM: every token attends to every one before it, however long the context."""

    notice = (
        "KLlamaAttention: the block-sparse attention for long contexts is not built; this computes exact attention, "
        "whose cache grows with the context"
    )


class KQwen2MoeAttention(GQAttention):
    """`GQAttention`, under the name of Qwen2-MoE's rule files."""


class KQwen3MoeAttention(GQAttention):
    """`GQAttention`, under the name of Qwen3-MoE's rule files."""


class KQwen3NextAttention(GQAttention):
    """`GQAttention`, under the name of Qwen3-Next's rule files."""


class KGlm4MoeAttention(GQAttention):
    """`GQAttention`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerAttention(GQAttention):
    """`GQAttention`, under the name of SmallThinker's rule files."""


class KQwen3NextGatedDeltaNet(FamilyOperator):
    """Qwen3-Next's linear attention with its convolution and recurrent state: hidden [B, S, H] -> [B, S, H]."""

    replaces = "a gated delta net (conv1d, A_log and dt_bias)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("conv1d", "A_log", "dt_bias"))
