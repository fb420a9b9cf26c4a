"""Attention of grouped queries: on the CPU in one native call, projections, norms, positions and cache included.

A module whose numbers are recognized (attending.py), with its projections on the CPU, computes on pages of the cache
(paged_cache.py). Anything else, a GPU, a cache of transformers, attentions asked for, gradients, stays the family's own
code, alone; its projections are children, so other rules may replace them.
Rule files name these classes as ``operators.attention.*`` and ``operators.balance_serve_attention.*``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.models.traits import TRAITS
from ktransformers.native import Attention
from ktransformers.operators.attending import Attending, attending_of
from ktransformers.operators.base_operator import FamilyOperator
from ktransformers.operators.linear import packed_of
from ktransformers.operators.paged_cache import PagedCache, PagedLayer

_CHANGE_NOTHING = frozenset({"use_cache", "output_attentions", "output_hidden_states", "cache_position", "position_ids",
                             "output_router_logits", "logits_to_keep", "return_dict"})  # fmt: skip
"""Arguments of an attention's forward that change no number where `output_attentions` is not asked for."""


class GQAttention(FamilyOperator):
    """hidden [B, S, H] -> ([B, S, H], weights or None)."""

    replaces = "attention of grouped queries (q_proj, k_proj, v_proj and o_proj)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attending: Attending | None = None
        self.native: Attention | None = None
        self._parts: dict[str, nn.Module | None] = {}
        self._tensors: list[Tensor] = []
        self._versions = 0

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["attention"](module) and not TRAITS["mla"](module)

    @property
    def computes_on_pages(self) -> bool:
        return self.native is not None

    def load(self) -> None:
        super().load()
        self.native = self._make()
        self._parts = dict(self._modules)
        self._tensors = [tensor for _, tensor in self.named_parameters()]
        self._versions = self._version()

    def unload(self) -> None:
        super().unload()
        self.native = None

    def _make(self) -> Attention | None:
        """The native call on the children's weights, or None where they are not all on the CPU or not recognized."""
        if not native.available():
            return None
        found = attending_of(self.orig_module)
        if found is None:
            return None
        parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        if found.gate is not None:
            parts["g"] = found.gate
        linears = {part: packed_of(self._modules[name]) for part, name in parts.items()}
        tensors = [t for _, t in self.named_parameters() if t.device.type != "cpu"]
        if tensors or any(linear is None for linear in linears.values()):
            return None
        norms = {}
        if found.norms is not None:
            norms = {p: found.norm_weight(self._modules[n]) for p, n in zip("qk", found.norms, strict=True)}
        sinks = None if found.sinks is None else self._parameters[found.sinks]
        self.attending = found
        return Attention(
            {part: weight for part, (weight, _) in linears.items()}, found.shape,
            {part: bias for part, (_, bias) in linears.items()}, norms, sinks, self.key,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = None if args else self.pages(hidden_states, kwargs)
        if held is not None:
            return self._computed(hidden_states, held, **kwargs), None
        return super().forward(hidden_states, *args, **kwargs)

    def pages(self, hidden: Tensor, kwargs: dict[str, Any]) -> PagedLayer | None:
        """This layer's part of the cache, ready for a native call with these arguments of `forward`; a passing one
        where no cache is kept; None where the family's code has to compute."""
        if self.native is None or not self._is_plain(hidden, kwargs):
            return None
        cache = kwargs.get("past_key_values")
        held = PagedLayer() if cache is None else cache.layers[self.layer_idx] if type(cache) is PagedCache else None
        if not isinstance(held, PagedLayer):
            return None
        held.prepare(self.attending.shape.kv_heads, self.attending.shape.size, self.attending.shape.value_size,
                     hidden.dtype)  # fmt: skip
        return held

    def _computed(
        self,
        hidden: Tensor,
        held: PagedLayer,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        positions = position_embeddings if self.attending.rotates else None
        first = held.first_visible() if attention_mask is not None else 0
        out = self.native.forward(hidden, held.pages, positions, attention_mask, first)
        held.advanced()
        return out

    def _is_plain(self, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nothing is asked for that only the family's code does."""
        if hidden.device.type != "cpu" or torch.is_grad_enabled() and self._wants_gradients(hidden):
            return False
        if any(self._parts[name] is not child for name, child in self._modules.items()):  # PEFT wraps children
            return False
        if self._version() != self._versions:  # trained since: norms and biases were copied
            return False
        if kwargs.get("output_attentions", getattr(self.orig_module.config, "output_attentions", False)):
            return False
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool
                                     and mask.shape[1] == 1 and mask.shape[2] == hidden.shape[1]):  # fmt: skip
            return False
        known = _CHANGE_NOTHING | {"attention_mask", "position_embeddings", "past_key_values"}
        return all(name in known or value is None for name, value in kwargs.items())

    def _version(self) -> int:
        return sum(tensor._version for tensor in self._tensors)

    def _wants_gradients(self, hidden: Tensor) -> bool:
        return hidden.requires_grad or any(p.requires_grad for p in self.parameters())


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
