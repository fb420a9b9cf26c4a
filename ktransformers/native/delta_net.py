"""A gated delta net on packed weights: the step of one new token a sequence in one call.

The rule is that of Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule"; kt_native.h says what is
computed. Letters: B sequences, H hidden, G key heads of size K, A value heads of size V, W width of the convolution,
C = 2*G*K + A*V channels of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES, checked_input, read_floats
from ktransformers.native.library import State, loaded, pooled
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed

ORDERS = {"split": ("qkv", "z", "b", "a"), "by_head": ("qkvz", "ba")}
"""Names of kt_delta_order -> the matrices that meet the input, in order; a test holds them to the header."""
TENSORS = ("conv", "conv_bias", "rate", "dt_bias", "norm")
"""What there is besides matrices: fp32 [C, W], [C] or none, [A], [A] and [V]."""


@dataclass(frozen=True)
class Shape:
    """What a delta net computes, besides its tensors; see kt_delta_net_desc in kt_native.h for each."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    width: int
    norm_eps: float = 1e-6
    l2_eps: float = 1e-6
    order: str = "split"

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size

    def kept(self, batch: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
        """Shapes of what is kept of B sequences: [B, C, W] of the convolution, [B, A, K, V] of the states."""
        return (batch, self.channels, self.width), (batch, self.value_heads, self.key_size, self.value_size)


class Kept(Protocol):
    """What is kept for a delta net, wherever that is now."""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`conv` and `states`, as `DeltaNet.forward` takes them."""


class DeltaNet:
    """hidden [B, 1, H] -> [B, 1, H], and what is kept of each sequence changes. Keeps the Packed weights alive. No
    gradients."""

    def __init__(
        self,
        weights: Mapping[str, Packed],
        shape: Shape,
        tensors: Mapping[str, torch.Tensor | None],
        biases: Mapping[str, torch.Tensor | None] | None = None,
        name: str = "delta net",
    ) -> None:
        """`weights` by the names of the shape's order in ORDERS, and "out"; `biases` float [N] likewise, or None;
        `tensors` by TENSORS. Raises UnsupportedError, NativeError."""
        if shape.order not in ORDERS:
            raise NativeError(f"{name}: found order {shape.order!r}, expected one of {', '.join(ORDERS)}.")
        state = loaded()
        self.name, self.shape = name, shape
        self._keep: list[Any] = []
        desc, biases = state.ffi.new("kt_delta_net_desc *"), biases or {}
        for i, part in enumerate(ORDERS[shape.order]):
            rows, _ = self._weight(state, weights, part, desc.inputs[i])
            desc.in_bias[i] = self._floats(state, biases.get(part), (rows,), f"{part} bias")
        self.hidden, _ = self._weight(state, weights, "out", desc.out)
        desc.out_bias = self._floats(state, biases.get("out"), (self.hidden,), "out bias")
        sizes = ((shape.channels, shape.width), (shape.channels,), (shape.value_heads,), (shape.value_heads,),
                 (shape.value_size,))  # fmt: skip
        for part, size in zip(TENSORS, sizes, strict=True):
            if tensors.get(part) is None and part != "conv_bias":
                raise NativeError(f"{name} ({part}): found none, expected float {list(size)}.")
            setattr(desc, part, self._floats(state, tensors.get(part), size, part))
        for field in ("key_heads", "value_heads", "key_size", "value_size", "width", "norm_eps", "l2_eps"):
            setattr(desc, field, getattr(shape, field))
        desc.order = list(ORDERS).index(shape.order)
        out = state.ffi.new("kt_delta_net **")
        state.check(state.lib.kt_delta_net_create(desc, out), name)
        self.handle = state.ffi.gc(out[0], state.lib.kt_delta_net_destroy)

    def _weight(self, state: State, weights: Mapping[str, Packed], part: str, into: Any) -> tuple[int, int]:
        if part not in weights:
            expected = ", ".join((*ORDERS[self.shape.order], "out"))
            raise NativeError(f"{self.name}: found no matrix {part}, expected {expected}.")
        return fill_weight(state, weights[part], f"{self.name} ({part})", self._keep, into)

    def _floats(self, state: State, values: Any, size: tuple[int, ...], what: str) -> Any:
        """A pointer to fp32 values that this object keeps alive; NULL for none."""
        if values is None:
            return state.ffi.NULL
        self._keep.append(read_floats(values, size, f"{self.name} ({what})"))
        return state.ffi.cast("float *", self._keep[-1].data_ptr())

    def problem(self, batch: int, conv: torch.Tensor, states: torch.Tensor) -> str:
        """Why C cannot change these two in place, in words; an empty string where it can."""
        for what, x, shape, dtypes in zip(
            ("inputs of the convolution", "states"), (conv, states), self.shape.kept(batch),
            (tuple(DTYPES), (torch.float32,)), strict=True,
        ):  # fmt: skip
            plain = x.layout is torch.strided and x.device.type == "cpu" and x.is_contiguous() and not x.is_neg()
            if tuple(x.shape) != shape or x.dtype not in dtypes or not plain:
                names = " or ".join(str(dtype) for dtype in dtypes)
                found = f"{x.dtype} {list(x.shape)} on {x.device}, contiguous={plain}"
                return f"found {what} of {found}, expected {names} {list(shape)} on the cpu, contiguous"
        return ""

    def forward(self, hidden: torch.Tensor, conv: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """One new token of each of B sequences.

        Args:
            hidden: [B, 1, H] of float32, bfloat16 or float16.
            conv: [B, C, W] of one of these, contiguous: the last W inputs of the convolution, the newest last. Changed.
            states: float32 [B, A, K, V], contiguous. Changed.

        Raises NativeError for any other; then nothing has changed.
        """
        state, pool = pooled()
        hidden = checked_input(hidden, self.hidden, self.name)
        call, cast = state.ffi.new("kt_delta_net_call *"), state.ffi.cast
        self._check(hidden)
        self.fill_kept(state, call, hidden.shape[0], conv, states)
        call.dtype, call.batch = DTYPES[hidden.dtype], hidden.shape[0]
        out = torch.empty_like(hidden)
        status = state.lib.kt_delta_net_forward(
            self.handle, pool, call, cast("void *", hidden.data_ptr()), cast("void *", out.data_ptr())
        )
        state.check(status, self.name)
        return out

    def fill(self, state: State, call: Any, hidden: torch.Tensor, *_: Any) -> list[torch.Tensor]:
        """Write into the `call` of a layer what a delta net needs of it, as `Attention.fill` does."""
        self._check(hidden)
        call.dtype, call.batch, call.tokens = DTYPES[hidden.dtype], hidden.shape[0], 1
        return []

    def fill_kept(
        self, state: State, call: Any, batch: int, conv: torch.Tensor, states: torch.Tensor
    ) -> list[torch.Tensor]:
        """Write what is kept into `call`, a kt_delta_net_call. Returns what must live until the call is done."""
        problem = self.problem(batch, conv, states)
        if problem:
            raise NativeError(f"{self.name}: {problem}.")
        call.conv_dtype = DTYPES[conv.dtype]
        call.conv, call.state = (
            state.ffi.cast("void *", conv.data_ptr()),
            state.ffi.cast("float *", states.data_ptr()),
        )
        return [conv, states]

    def _check(self, hidden: torch.Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[1] != 1:
            raise NativeError(f"{self.name}: found hidden {list(hidden.shape)}, expected [B, 1, {self.hidden}].")
