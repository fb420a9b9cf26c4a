"""Decoder layers in one call: norms, self-attention, experts or a dense MLP, and the sums between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.block import Block
from ktransformers.native.checks import checked_input, read_floats
from ktransformers.native.library import State, loaded, pooled

if TYPE_CHECKING:
    from ktransformers.native.experts import Experts
    from ktransformers.native.pages import Pages
    from ktransformers.native.self_attention import Attention


class Layer:
    """x + factor * attention(norm(x)), and to that factor * mlp(norm(.)). Keeps its parts alive. No gradients."""

    def __init__(
        self,
        attention: Attention,
        mlp: Block | Experts,
        norms: Sequence[torch.Tensor],
        eps: Sequence[float],
        factor: float = 1.0,
        name: str = "layer",
    ) -> None:
        """`mlp`: a Block, or Experts of one expert. `norms`: float [H] before attention and before `mlp`, with `eps`
        each. Raises NativeError for what does not fit together."""
        state = loaded()
        self.name, self.attention, self.hidden = name, attention, attention.hidden
        self._keep: list[Any] = [attention, mlp]
        desc = state.ffi.new("kt_layer_desc *", {"factor": factor})
        desc.attention = attention.handle
        setattr(desc, "moe" if isinstance(mlp, Block) else "mlp", mlp.handle)
        for field, weight, value in zip(("attention", "mlp"), norms, eps, strict=True):
            self._keep.append(read_floats(weight, (self.hidden,), f"{name} ({field} norm)"))
            setattr(desc, f"{field}_norm", state.ffi.cast("float *", self._keep[-1].data_ptr()))
            setattr(desc, f"{field}_eps", value)
        out = state.ffi.new("kt_layer **")
        state.check(state.lib.kt_layer_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_layer_destroy)
        self.number = torch_ops.name_it(self)


class Layers:
    """Several layers as one call, and perhaps the norm after them. `calls` and `first`, the layer that each kind of
    positions is written to, are for who fills the calls himself."""

    def __init__(
        self,
        layers: Sequence[Layer],
        kinds: Sequence[int] | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        """`kinds`: of each layer, the number of its positions in what `forward` is given; None: all take the first.
        `norm`: weight, float [H], and eps of one after the last layer, as those of a `Layer`."""
        if not layers:
            raise NativeError("layers: found none, expected at least one.")
        state = loaded()
        self.layers, self.hidden, self.name = list(layers), layers[0].hidden, layers[0].name
        self.kinds = kinds = list(kinds or [0] * len(layers))
        self.norm = norm
        self.first = [kinds.index(kind) for kind in range(max(kinds) + 1)]  # layer of each kind
        self._handles = state.ffi.new("kt_layer *[]", [layer.handle for layer in layers])
        self.calls = state.ffi.new("kt_attention_call[]", len(layers))
        for i, kind in enumerate(kinds):
            self.calls[i].like = self.first[kind]
        self.stack = state.ffi.new("kt_stack *", {"count": len(layers), "layers": self._handles, "calls": self.calls})
        if norm is not None:
            self._norm = read_floats(norm[0], (self.hidden,), f"{self.name} (last norm)")
            self.stack.norm, self.stack.eps = state.ffi.cast("float *", self._norm.data_ptr()), norm[1]
        self._sequences: list[Any] = [None] * len(layers)
        self._lock = threading.Lock()

    def forward(
        self,
        hidden: torch.Tensor,
        pages: Sequence[Pages],
        positions: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = (None,),
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        pads: tuple[int, ...] | None = None,
        q_factors: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """hidden [B, S, H] through all of them, with pages for each layer and positions for each kind of layer: what
        follows is as `Attention.forward` takes it. `pads`: how many tokens on the left of each are padding."""
        state, pool = pooled()
        hidden = checked_input(hidden, self.hidden, self.name)
        if hidden.dim() != 3 or len(pages) != len(self.layers) or len(positions) != len(self.first):
            found = f"hidden {list(hidden.shape)}, pages of {len(pages)} layers and {len(positions)} kinds of positions"
            expected = f"[B, S, {self.hidden}], {len(self.layers)} and {len(self.first)}"
            raise NativeError(f"{self.name}: found {found}, expected {expected}.")
        if pads is not None and len(pads) != hidden.shape[0]:
            raise NativeError(f"{self.name}: found pads of {len(pads)} sequences, expected {hidden.shape[0]}.")
        out = torch.empty_like(hidden)
        cast = state.ffi.cast
        with self._lock:  # the calls are made once, and written to at every step
            kept = self.fill(state, hidden, pages, positions, mask, mask_first, pads, q_factors)
            status = state.lib.kt_layers_forward(
                self.stack, pool, cast("void *", hidden.data_ptr()), cast("void *", out.data_ptr())
            )
        state.check(status, self.name)
        del kept
        return out

    def fill(
        self,
        state: State,
        hidden: torch.Tensor,
        pages: Sequence[Pages],
        positions: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        pads: tuple[int, ...] | None = None,
        q_factors: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """Write a step into the calls: all of it into the first of each kind, and each layer's pages. Returns what must
        live until the call is done."""
        batch, tokens = hidden.shape[:2]
        kept = []
        for kind, i in enumerate(self.first):
            fill, factor = self.layers[i].attention.fill, q_factors[kind] if q_factors else None
            kept += fill(state, self.calls[i], hidden, pages[i], positions[kind], mask, mask_first, factor, pads)
        for i, held in enumerate(pages):
            if held.length + tokens > held.room or len(held.tables) != batch:
                held.make_room(batch, tokens)
            held.pad(pads)
            if self._sequences[i] is not held.sequences:  # made anew where sequences came, went or were cut
                call, self._sequences[i] = self.calls[i], held.sequences
                call.sequences, call.layout, call.window = held.sequences, held.layout, held.window
        return kept

