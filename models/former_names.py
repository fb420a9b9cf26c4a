"""Where older transformers had modules that today's has elsewhere: rule files written then call them so.

Only names; what such modules compute, and their classes, did not change.
"""

from ktransformers.models.traits import TRAITS
from torch import nn

_BLOCK_SPARSE_MOE = ("mixtral", "minimax", "minimax_m2", "phimoe")
"""Families whose ``mlp`` was called ``block_sparse_moe``."""


def former_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module name -> the names it had, for those that had any.

    One rotary embedding serves all layers where each layer's attention had its own: it had as many names.
    """
    former: dict[str, tuple[str, ...]] = {}
    renamed = getattr(getattr(model, "config", None), "model_type", None) in _BLOCK_SPARSE_MOE
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        layers = getattr(model.get_submodule(parent), "layers", None)
        if child and TRAITS["rotary"](module) and isinstance(layers, nn.ModuleList):
            former[name] = tuple(f"{parent}.layers.{i}.self_attn.{child}".lstrip(".") for i in range(len(layers)))
        elif renamed and ".mlp" in name:
            former[name] = (name.replace(".mlp", ".block_sparse_moe"),)
    return former
