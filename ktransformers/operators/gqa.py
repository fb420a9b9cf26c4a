"""Attention of grouped queries: on the CPU in one native call, projections, norms, positions and cache included.

A module whose numbers are recognized (attending.py), with its projections on the CPU, computes on pages of the cache
(paged_attention.py). Anything else stays the family's own code, alone; its projections are children, so other rules may
replace them.
Rule files name these classes as ``operators.attention.*`` and ``operators.balance_serve_attention.*``.
"""

from torch import nn

from ktransformers.models.traits import TRAITS
from ktransformers.operators import attending, attending_latents
from ktransformers.operators.delta_net import KGatedDeltaNet
from ktransformers.operators.paged_attention import PagedAttention


class GQAttention(PagedAttention):
    """hidden [B, S, H] -> ([B, S, H], weights or None)."""

    replaces = "attention of grouped queries (q_proj, k_proj, v_proj and o_proj)"

    kinds = (attending.attending_of,)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["attention"](module) and not TRAITS["mla"](module)


class KAttention(GQAttention):
    """Attention of any kind, grouped queries or latents: natively where that is known, elsewhere the family's own."""

    replaces = "attention"
    kinds = (attending.attending_of, attending_latents.attending_of)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["self_attention"](module)


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


class KQwen3NextGatedDeltaNet(KGatedDeltaNet):
    """`KGatedDeltaNet`, under the name of Qwen3-Next's rule files."""
