"""Multi-head latent attention on packed weights: projections, norms, positions, cache and attention in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktransformers.native import torch_ops
from ktransformers.native.library import loaded
from ktransformers.native.self_attention import GATE_BY, GATES, PAIRS, PARTS, Attention
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed

WEIGHTS = ("q_a", "q", "kv_a", "kv_b", "g", "o")
"""Matrices of kt_latent_desc."""
_BIASES = {"q_a": "q", "q": "q", "kv_a": "k", "g": "g", "o": "o"}
"""Which of PARTS a matrix's bias is filed under."""


@dataclass(frozen=True)
class LatentShape:
    """What an attention module computes on latents, besides its matrices; see kt_latent_desc in kt_native.h.

    Letters: A `heads`, L `latent` rank, N `plain` and R `rotary` sizes of the parts of a query without and with a
    position, V `value_size`. `angles` as in `Shape`. With the gate "in_q" each head's rows of q end in V of its gate.
    """

    heads: int
    latent: int
    plain: int
    rotary: int
    value_size: int
    scale: float
    q_eps: float = 0.0
    kv_eps: float = 0.0
    key_eps: float = 0.0
    pairs: str = "halves"
    angles: str = "twice"
    gate: str | None = None
    gate_by: str = "sigmoid"
    window: int = 0


class LatentAttention(Attention):
    """hidden [B, S, H] -> [B, S, H], and latents and keys to joined pages. Keeps the weights alive. No gradients."""

    def __init__(
        self,
        weights: Mapping[str, Packed],
        shape: LatentShape,
        biases: Mapping[str, torch.Tensor | None] | None = None,
        norms: Mapping[str, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
        name: str = "attention",
    ) -> None:
        """`weights` by WEIGHTS (q_a and g only where there are such), `biases` float [N] likewise, of q only without
        q_a; `norms` of "q" (with q_a), "kv" and perhaps "key", `sinks` float [A]. Raises UnsupportedError,
        NativeError."""
        state = loaded()
        self.name, self.shape, self.hidden, self._keep = name, shape, 0, []
        desc = state.ffi.new("kt_latent_desc *")
        for part in WEIGHTS:
            if part not in weights:
                continue
            rows, cols = fill_weight(state, weights[part], f"{name} ({part})", self._keep, getattr(desc, part))
            self.hidden = cols if part == "kv_a" else self.hidden
            if (bias := (biases or {}).get(part)) is not None:
                self._floats(state, desc, bias, rows, f"{part} bias", ("bias", PARTS.index(_BIASES[part])))
        rank = weights["q_a"].shape[0] if "q_a" in weights else 0
        self._floats(state, desc, (norms or {}).get("q"), rank, "q norm", "q_norm")
        self._floats(state, desc, (norms or {}).get("kv"), shape.latent, "kv norm", "kv_norm")
        self._floats(state, desc, (norms or {}).get("key"), shape.rotary, "key norm", "key_norm")
        self._floats(state, desc, sinks, shape.heads, "sinks", "sinks")
        sizes = ("heads", "latent", "plain", "rotary", "value_size", "window")
        for field in (*sizes, "scale", "q_eps", "kv_eps", "key_eps"):
            setattr(desc, field, getattr(shape, field))
        desc.gate, desc.gate_by, desc.rotary_pairs = GATES[shape.gate], GATE_BY[shape.gate_by], PAIRS[shape.pairs]
        out = state.ffi.new("kt_attention **")
        state.check(state.lib.kt_latent_attention_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_attention_destroy)
        self.number = torch_ops.name_it(self)
