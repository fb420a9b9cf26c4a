"""Attention of grouped queries: on the CPU in one native call, projections, norms, positions and cache included.

A module whose numbers are recognized (attending.py), with its projections on the CPU, computes on pages of the cache
(paged_attention.py). Anything else stays the family's own code, alone; its projections are children, so other rules may
replace them.
Rule files name these classes as ``operators.attention.*`` and ``operators.balance_serve_attention.*``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ktransformers.models.traits import TRAITS
from ktransformers.native import Attention
from ktransformers.operators.attending import Attending, attending_of
from ktransformers.operators.base_operator import FamilyOperator
from ktransformers.operators.linear import packed_of
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedLayer


class GQAttention(PagedAttention):
    """hidden [B, S, H] -> ([B, S, H], weights or None)."""

    replaces = "attention of grouped queries (q_proj, k_proj, v_proj and o_proj)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attending: Attending | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["attention"](module) and not TRAITS["mla"](module)

    def make_native(self) -> Attention | None:
        found = attending_of(self.orig_module)
        if found is None:
            return None
        parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        if found.gate is not None:
            parts["g"] = found.gate
        linears = {part: packed_of(self._modules[name]) for part, name in parts.items()}
        elsewhere = [t for _, t in self.named_parameters() if t.device.type != "cpu"]
        if elsewhere or any(linear is None for linear in linears.values()):
            return None
        norms = {}
        if found.norms is not None:
            norms = {p: found.norm_weight(self._modules[n]) for p, n in zip("qk", found.norms, strict=True)}
        sinks = None if found.sinks is None else self._parameters[found.sinks]
        self.attending, self.rotates = found, found.rotates
        shape = found.shape if found.rotates else replace(found.shape, pairs="none")
        return Attention(
            {part: weight for part, (weight, _) in linears.items()}, shape,
            {part: bias for part, (_, bias) in linears.items()}, norms, sinks, self.key,
        )  # fmt: skip

    def make_pages(self, held: PagedLayer, dtype: torch.dtype) -> None:
        shape = self.attending.shape
        held.prepare(shape.kv_heads, shape.size, shape.value_size, dtype)


class KAttention(GQAttention):
    """Attention of any kind: `GQAttention` where that computes it, and elsewhere the family's own."""

    replaces = "attention"

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


class KQwen3NextGatedDeltaNet(FamilyOperator):
    """Qwen3-Next's linear attention with its convolution and recurrent state: hidden [B, S, H] -> [B, S, H]."""

    replaces = "a gated delta net (conv1d, A_log and dt_bias)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("conv1d", "A_log", "dt_bias"))
