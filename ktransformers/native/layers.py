"""Decoder layers in one call: norms, self-attention, experts or a dense MLP, and the sums between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.block import Block
from ktransformers.native.checks import as_read, checked_input, readable_tensor
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
            readable_tensor(weight, f"{name} ({field} norm)", f"float [{self.hidden}]", movable=True)
            if tuple(weight.shape) != (self.hidden,) or not weight.is_floating_point():
                found = f"{weight.dtype} {list(weight.shape)}"
                raise NativeError(f"{name} ({field} norm): found {found}, expected float [{self.hidden}].")
            self._keep.append(as_read(weight, torch.float32))
            setattr(desc, f"{field}_norm", state.ffi.cast("float *", self._keep[-1].data_ptr()))
            setattr(desc, f"{field}_eps", value)
        out = state.ffi.new("kt_layer **")
        state.check(state.lib.kt_layer_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_layer_destroy)
        self.number = torch_ops.name_it(self)


class Layers:
    """Several layers as one call."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        if not layers:
            raise NativeError("layers: found none, expected at least one.")
        state = loaded()
        self.layers, self.hidden, self.name = list(layers), layers[0].hidden, layers[0].name
        self._handles = state.ffi.new("kt_layer *[]", [layer.handle for layer in layers])
        self._calls = state.ffi.new("kt_attention_call[]", len(layers))
        self._sequences: list[Any] = [None] * len(layers)
        self._lock = threading.Lock()

    def forward(
        self,
        hidden: torch.Tensor,
        pages: Sequence[Pages],
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        q_factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden [B, S, H] through all of them: what follows is as `Attention.forward` takes it, with pages for each
        layer."""
        state, pool = pooled()
        hidden = checked_input(hidden, self.hidden, self.name)
        if hidden.dim() != 3 or len(pages) != len(self.layers):
            found = f"hidden {list(hidden.shape)} and pages of {len(pages)} layers"
            expected = f"[B, S, {self.hidden}] and {len(self.layers)}"
            raise NativeError(f"{self.name}: found {found}, expected {expected}.")
        out = torch.empty_like(hidden)
        cast = state.ffi.cast
        with self._lock:  # the calls are made once, and written to at every step
            kept = self._fill(state, hidden, pages, positions, mask, mask_first, q_factor)
            status = state.lib.kt_layers_forward(
                len(self.layers), self._handles, self._calls, pool, cast("void *", hidden.data_ptr()),
                cast("void *", out.data_ptr()),
            )  # fmt: skip
        state.check(status, self.name)
        del kept
        return out

    def _fill(
        self,
        state: State,
        hidden: torch.Tensor,
        pages: Sequence[Pages],
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        mask_first: int,
        q_factor: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Write a step into the calls: all of it into the first, and each layer's pages. As `Attention.fill`."""
        batch, tokens = hidden.shape[:2]
        first = self.layers[0].attention
        kept = first.fill(state, self._calls[0], hidden, pages[0], positions, mask, mask_first, q_factor)
        for i, held in enumerate(pages):
            if held.length + tokens > held.room or len(held.tables) != batch:
                held.make_room(batch, tokens)
            if self._sequences[i] is not held.sequences:  # made anew where sequences came, went or were cut
                self._sequences[i] = held.sequences
                self._calls[i].sequences, self._calls[i].layout = held.sequences, held.layout
        return kept
