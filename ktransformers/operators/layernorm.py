"""Norms as operators: the family's own norm, where a rule puts it. No kernels here.

Rule files name one class per family; they are one and the same operator.
"""

from torch import nn

from ktransformers.models.traits import TRAITS
from ktransformers.operators.base_operator import FamilyOperator


class RMSNorm(FamilyOperator):
    """hidden [..., H] -> [..., H], as the family normalizes it (Qwen3-Next, for one, scales by 1 + weight)."""

    replaces = "a norm"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["norm"](module)


class DeepseekV3RMSNormTorch(RMSNorm):
    """`RMSNorm`, under the name of DeepSeek-V3's rule files without kernels."""


class KQwen2MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen2-MoE's rule files."""


class KQwen3MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen3-MoE's rule files."""


class KQwen3NextRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen3-Next's rule files."""


class KGlm4MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of SmallThinker's rule files."""
