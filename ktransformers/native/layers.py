"""Decoder layers in one call: norms, self-attention or a delta net, experts or a dense MLP, and sums between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.block import Block
from ktransformers.native.checks import checked_input, read_floats
from ktransformers.native.delta_net import DeltaNet, Kept
from ktransformers.native.library import State, loaded, pooled

if TYPE_CHECKING:
    from ktransformers.native.experts import Experts
    from ktransformers.native.pages import Pages
    from ktransformers.native.self_attention import Attention


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight, float [H]; centered: of x - mean(x)."""

    weight: torch.Tensor
    eps: float
    centered: bool = False

    def fill(self, state: State, to: Any, hidden: int, subject: str) -> torch.Tensor:
        """Write it into a kt_row_norm. Returns what must live as long."""
        weight = read_floats(self.weight, (hidden,), f"{subject} norm")
        to.weight, to.eps, to.centered = state.ffi.cast("float *", weight.data_ptr()), self.eps, self.centered
        return weight


@dataclass(frozen=True)
class Joining:
    """How a part joins the sum: keep * x + factor * after(part(before(x))). None: no norm."""

    before: Norm | None = None
    after: Norm | None = None
    keep: float = 1.0
    factor: float = 1.0


class Layer:
    """What mixes tokens joins the sum, then an MLP; `parallel`: that sees the sum as the mixer did. Keeps its parts
    alive. No gradients."""

    def __init__(
        self,
        mixer: Attention | DeltaNet,
        mlp: Block | Experts,
        first: Joining,
        second: Joining,
        parallel: bool = False,
        name: str = "layer",
    ) -> None:
        """`mlp`: a Block, or Experts of one expert. `first` and `second`: of `mixer` and of `mlp`. Raises NativeError
        for what does not fit together."""
        state = loaded()
        self.name, self.mixer, self.hidden = name, mixer, mixer.hidden
        self._keep: list[Any] = [mixer, mlp]
        desc = state.ffi.new("kt_layer_desc *", {"parallel": parallel})
        setattr(desc, "delta_net" if isinstance(mixer, DeltaNet) else "attention", mixer.handle)
        setattr(desc, "moe" if isinstance(mlp, Block) else "mlp", mlp.handle)
        for part, how, to in (("mixer", first, desc.first), ("mlp", second, desc.second)):
            to.keep, to.factor = how.keep, how.factor
            for place, norm in (("before", how.before), ("after", how.after)):
                if norm is not None:
                    kept = norm.fill(state, getattr(to, place), self.hidden, f"{name}, {place} {part}:")
                    self._keep.append(kept)
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
        norm: Norm | None = None,
    ) -> None:
        """`kinds`: of each layer, the number of its positions in what `forward` is given; None: all take the first.
        `norm`: the one after the last layer."""
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
        self._nets = state.ffi.new("kt_delta_net_call[]", len(layers))
        self.stack = state.ffi.new("kt_stack *", {
            "count": len(layers), "layers": self._handles, "calls": self.calls, "nets": self._nets,
        })  # fmt: skip
        if norm is not None:
            self._norm = norm.fill(state, self.stack.norm, self.hidden, f"{self.name}, last")
        self._sequences: list[Any] = [None] * len(layers)
        self._lock = threading.Lock()

    def forward(
        self,
        hidden: torch.Tensor,
        pages: Sequence[Pages | Kept],
        positions: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = (None,),
        mask: torch.Tensor | None = None,
        mask_first: int = 0,
        pads: tuple[int, ...] | None = None,
        q_factors: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """hidden [B, S, H] through all of them, with pages for each layer, or what is kept for a delta net, and
        positions for each kind of layer: what follows is as `Attention.forward` takes it. `pads`: how many tokens on
        the left of each are padding."""
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
        pages: Sequence[Pages | Kept],
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
            fill, factor = self.layers[i].mixer.fill, q_factors[kind] if q_factors else None
            kept += fill(state, self.calls[i], hidden, pages[i], positions[kind], mask, mask_first, factor, pads)
        for i, held in enumerate(pages):
            if isinstance(self.layers[i].mixer, DeltaNet):
                kept += self.layers[i].mixer.fill_kept(state, self._nets[i], batch, *held.tensors())
                continue
            if held.length + tokens > held.room or len(held.tables) != batch:
                held.make_room(batch, tokens)
            held.pad(pads)
            if self._sequences[i] is not held.sequences:  # made anew where sequences came, went or were cut
                call, self._sequences[i] = self.calls[i], held.sequences
                call.sequences, call.layout, call.window = held.sequences, held.layout, held.window
        return kept

