"""Dense MLPs (and shared experts) as operators: the family's own, where a rule puts it.

Their linear layers are children, so other rules may replace them. Rule files name one class per family; they are one
and the same operator.
"""

from torch import nn

from ktransformers.operators.base_operator import FamilyOperator


class GatedMLP(FamilyOperator):
    """hidden [..., H] -> [..., H]: down(activation(gate) * up), as the family computes it."""

    replaces = "a dense MLP (gate_proj, up_proj and down_proj, or gate_up_proj and down_proj)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_children()}
        return "down_proj" in names and ({"gate_proj", "up_proj"} <= names or "gate_up_proj" in names)


class kDeepseekV3MLP(GatedMLP):  # upstream's spelling
    """`GatedMLP`, under the name of DeepSeek-V3's rule files."""


class KQwen2MoeMLP(GatedMLP):
    """`GatedMLP`, under the name of Qwen2-MoE's and Qwen3-MoE's rule files."""


class KGlm4MoeMLP(GatedMLP):
    """`GatedMLP`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerDenseMlpBlock(GatedMLP):
    """`GatedMLP`, under the name of SmallThinker's rule files."""
