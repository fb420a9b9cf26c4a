"""An attention module on packed weights: projections, norms, positions, cache and attention in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES, as_read, checked_input, read_floats
from ktransformers.native.library import State, loaded, pooled
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.native.pages import Pages
    from ktransformers.quants.blocks import Packed

PARTS = ("q", "k", "v", "g", "o")
"""Names of kt_part in order; a test holds them to the header."""
GATES = {None: 0, "in_q": 1, "elements": 2, "heads": 3}
"""Names of kt_gate."""
GATE_BY = {"sigmoid": 0, "softplus": 1}
"""Names of kt_gate_by."""
PAIRS = {"halves": 0, "neighbours": 1, "parted": 2, "none": 3}
"""Names of kt_pairs."""


@dataclass(frozen=True)
class Shape:
    """What an attention module computes, besides its matrices; see kt_attention_desc in kt_native.h for each.

    `angles`: whether cos and sin have each angle "twice", so that a token's row is as long as what turns, first all and
    then all again, or each "beside" itself, or "once". `value_factor`: 0 for none.
    Letters: A `heads` of queries on C `kv_heads` of keys and values, D `size` of a query, V `value_size`.
    """

    heads: int
    kv_heads: int
    size: int
    value_size: int
    scale: float
    eps: float = 0.0
    norm_whole: bool = False
    norm_last: bool = False
    pairs: str = "halves"
    angles: str = "twice"
    gate: str | None = None
    gate_by: str = "sigmoid"
    clip: float = 0.0
    value_factor: float = 0.0
    window: int = 0


class Attention:
    """hidden [B, S, H] -> [B, S, H], and keys and values to the pages. Keeps the Packed weights alive. No gradients."""

    def __init__(
        self,
        weights: Mapping[str, Packed],
        shape: Shape,
        biases: Mapping[str, torch.Tensor] | None = None,
        norms: Mapping[str, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
        name: str = "attention",
    ) -> None:
        """`weights` by PARTS (g only with a gate of its own), `biases` float [N] likewise, `norms` of "q" and "k"
        float [D] (with norm_whole [A*D] and [C*D]) and of "v" float [V], `sinks` float [A]. Raises UnsupportedError,
        NativeError."""
        state = loaded()
        self.name, self.shape, self.hidden = name, shape, 0
        self._keep: list[Any] = []
        desc = state.ffi.new("kt_attention_desc *")
        for part in PARTS:
            if part in weights:
                rows, cols = fill_weight(state, weights[part], f"{name} ({part})", self._keep, getattr(desc, part))
                self._floats(state, desc, (biases or {}).get(part), rows, f"{part} bias", ("bias", PARTS.index(part)))
                self.hidden = cols if part == "q" else self.hidden
        whole = {"q": shape.heads, "k": shape.kv_heads}
        for part, heads in whole.items():
            width = shape.size * (heads if shape.norm_whole else 1)
            self._floats(state, desc, (norms or {}).get(part), width, f"{part} norm", f"{part}_norm")
        self._floats(state, desc, (norms or {}).get("v"), shape.value_size, "v norm", "v_norm")
        self._floats(state, desc, sinks, shape.heads, "sinks", "sinks")
        for field in ("heads", "kv_heads", "size", "value_size", "scale", "eps", "clip", "value_factor", "window"):
            setattr(desc, field, getattr(shape, field))
        desc.norm_whole, desc.norm_last = shape.norm_whole, shape.norm_last
        desc.gate, desc.gate_by, desc.rotary_pairs = GATES[shape.gate], GATE_BY[shape.gate_by], PAIRS[shape.pairs]
        out = state.ffi.new("kt_attention **")
        state.check(state.lib.kt_attention_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_attention_destroy)
        self.number = torch_ops.name_it(self)

    def _floats(self, state: State, desc: Any, values: Any, width: int, what: str, field: Any) -> None:
        """Point `field` of `desc` at fp32 [width] that this object keeps alive."""
        if values is None:
            return
        self._keep.append(read_floats(values, (width,), f"{self.name} ({what})"))
        pointer = state.ffi.cast("float *", self._keep[-1].data_ptr())
        if isinstance(field, tuple):
            getattr(desc, field[0])[field[1]] = pointer
        else:
            setattr(desc, field, pointer)

    def forward(
        self,
        hidden: torch.Tensor,
        pages: Pages,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        q_factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step: S new tokens of each of B sequences, whose keys and values are appended to `pages`.

        Args:
            hidden: [B, S, H] of float32, bfloat16 or float16.
            pages: of the B sequences in this layer.
            positions: cos and sin, [B or 1, S, R] each, or R/2 with angles "once". None: no positions.
            mask: bool [B or 1, 1, S, T], true for the keys `mask_first` .. `mask_first` + T that a query sees; None is
                causal, within the window.
            q_factor: float [B or 1, S] that each token's queries are multiplied by; None is 1. Not of latents.
        """
        if isinstance(hidden, torch.Tensor) and torch_ops.is_watched(hidden):
            cos, sin = positions or (None, None)
            return torch_ops.attention(hidden, cos, sin, mask, mask_first, self.number, pages.number, q_factor)
        return self.compute(hidden, pages, positions, mask, mask_first, q_factor)

    def compute(
        self,
        hidden: torch.Tensor,
        pages: Pages,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        q_factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward`, past torch's dispatcher."""
        state, pool = pooled()
        hidden = checked_input(hidden, self.hidden, self.name)
        if hidden.dim() != 3:
            raise NativeError(f"{self.name}: found hidden {list(hidden.shape)}, expected [B, S, {self.hidden}].")
        out = torch.empty_like(hidden)
        call = state.ffi.new("kt_attention_call *")  # its own: another thread may be in here, too
        kept = self.fill(state, call, hidden, pages, positions, mask, mask_first, q_factor)
        cast = state.ffi.cast
        status = state.lib.kt_attention_forward(
            self.handle, pool, call, cast("void *", hidden.data_ptr()), cast("void *", out.data_ptr())
        )
        state.check(status, self.name)
        del kept
        return out

    def fill(
        self,
        state: State,
        call: Any,
        hidden: torch.Tensor,
        pages: Pages,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        mask_first: int,
        q_factor: torch.Tensor | None = None,
        pads: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """Write a step into `call`, with room in `pages` for it; `pads`: as `Pages.pad` takes them. Returns what must
        live until the call is done."""
        cast = state.ffi.cast
        batch, tokens = hidden.shape[:2]
        call.dtype, call.batch, call.tokens = DTYPES[hidden.dtype], batch, tokens
        pages.make_room(batch, tokens)
        pages.pad(pads)
        call.sequences, call.layout, call.window = pages.sequences, pages.layout, pages.window
        kept = []
        if positions is None:
            call.cos = state.ffi.NULL
        else:
            cos, sin = (self.angles(x, batch, tokens) for x in positions)
            kept += [cos, sin]
            call.cos, call.sin = cast("void *", cos.data_ptr()), cast("void *", sin.data_ptr())
            call.rotary_dtype, call.rotary_row = DTYPES[cos.dtype], cos.shape[-1]
            call.rotary_batch = cos.stride(0) if cos.shape[0] > 1 else 0
            call.rotary = cos.shape[-1] * (1 if self.shape.angles == "twice" else 2)
        if mask is None:
            call.mask = state.ffi.NULL
        else:
            mask = self._mask(mask, batch, tokens, pages.length + tokens - mask_first)
            kept.append(mask)
            call.mask, call.mask_first = cast("uint8_t *", mask.data_ptr()), mask_first
            call.mask_row = mask.shape[-1]
            call.mask_batch = mask.shape[-1] * tokens if mask.shape[0] > 1 else 0
        if q_factor is None:
            call.q_factor = state.ffi.NULL
        else:
            q_factor = self._factor(q_factor, batch, tokens)
            kept.append(q_factor)
            call.q_factor = cast("float *", q_factor.data_ptr())
            call.q_factor_batch = tokens if q_factor.shape[0] > 1 else 0
        return kept

    def _factor(self, x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        if x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != tokens or not x.is_floating_point():
            found = f"{x.dtype} {list(x.shape)}"
            raise NativeError(f"{self.name}: found factors of {found}, expected float [{batch} or 1, {tokens}].")
        return as_read(x, torch.float32)

    def angles(self, x: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        """cos or sin [B or 1, S, ..] as C reads them."""
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != tokens or x.dtype not in DTYPES:
            found = f"{x.dtype} {list(x.shape)}"
            raise NativeError(f"{self.name}: found positions of {found}, expected float [{batch} or 1, {tokens}, R].")
        return (x[..., ::2] if self.shape.angles == "beside" else x).contiguous()

    def _mask(self, mask: torch.Tensor, batch: int, tokens: int, keys: int) -> torch.Tensor:
        each = mask.dim() == 4 and mask.shape[0] in (1, batch)
        if mask.dtype != torch.bool or not each or mask.shape[1:] != (1, tokens, keys):
            found, expected = f"{mask.dtype} {list(mask.shape)}", [batch, 1, tokens, keys]
            raise NativeError(f"{self.name}: found a mask {found}, expected bool {expected}.")
        return mask.contiguous()
