"""A linear layer on packed bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES, checked_input, read_floats
from ktransformers.native.library import loaded, pooled
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed


class Linear:
    """y = x @ W^T + bias on packed bytes. Keeps the Packed weight alive; makes no copy of it. Gradients reach x."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None, name: str = "linear") -> None:
        """`weight` [N, K] packed along K, `bias` [N] of any float dtype. Raises UnsupportedError, NativeError."""
        state = loaded()
        self.name, self.weight = name, weight
        self._keep: list[Any] = []
        self.packed = state.ffi.new("kt_weight *")
        self.out_features, self.in_features = fill_weight(state, weight, f"{name} (weight)", self._keep, self.packed)
        self.bias = None
        if bias is not None:
            self.bias = read_floats(bias, (self.out_features,), f"{name} (bias)")
        self.number = torch_ops.name_it(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., K] of float32, bfloat16 or float16 -> [..., N] of the same dtype."""
        if isinstance(x, torch.Tensor) and (torch_ops.is_watched(x) or torch_ops.wants_gradient(x)):
            return torch_ops.linear(x, self.number)
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, past torch's dispatcher."""
        state, pool = pooled()
        x = checked_input(x, self.in_features, self.name)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device="cpu")
        cast = state.ffi.cast
        bias = state.ffi.NULL if self.bias is None else cast("float *", self.bias.data_ptr())
        status = state.lib.kt_linear(
            pool, self.packed, bias, cast("void *", x.data_ptr()), DTYPES[x.dtype],
            x.numel() // self.in_features, cast("void *", out.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return out

    def backward(self, d_y: torch.Tensor) -> torch.Tensor:
        """The gradient of x [..., K] from that of y [..., N]; of d_y's dtype."""
        state, pool = pooled()
        d_y = checked_input(d_y, self.out_features, f"{self.name} (backward)")
        d_x = torch.empty((*d_y.shape[:-1], self.in_features), dtype=d_y.dtype, device="cpu")
        cast = state.ffi.cast
        status = state.lib.kt_linear_backward(
            pool, self.packed, cast("void *", d_y.data_ptr()), DTYPES[d_y.dtype], d_y.numel() // self.out_features,
            cast("void *", d_x.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return d_x

    __call__ = forward
