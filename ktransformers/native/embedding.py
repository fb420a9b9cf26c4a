"""Rows of an embedding table on packed bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES, readable_tensor
from ktransformers.native.library import loaded
from ktransformers.native.weights import fill_weight

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed


class Embedding:
    """ids [...] -> rows [..., H] of a table [V, H]. Keeps the Packed weight alive and copies nothing. No gradients."""

    def __init__(self, weight: Packed, name: str = "embedding") -> None:
        """`weight` [V, H] packed along H. Raises UnsupportedError, NativeError."""
        state = loaded()
        self.name, self.weight = name, weight
        self._keep: list[Any] = []
        self.packed = state.ffi.new("kt_weight *")
        self.count, self.hidden = fill_weight(state, weight, f"{name} (weight)", self._keep, self.packed)
        self.number = torch_ops.name_it(self)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`ids`: whole numbers from 0 to V - 1 on the CPU. `dtype`: float32, bfloat16 or float16."""
        if isinstance(ids, torch.Tensor) and torch_ops.is_watched(ids):
            return torch_ops.embedding(ids, dtype, self.number)
        return self.compute(ids, dtype)

    def compute(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`forward`, past torch's dispatcher."""
        state = loaded()
        readable_tensor(ids, f"{self.name} (ids)", "int64 [...]")
        if ids.dtype not in (torch.int64, torch.int32) or dtype not in DTYPES:
            found = f"ids of {ids.dtype} for {dtype}"
            raise NativeError(f"{self.name}: found {found}, expected int64 for float32, bfloat16 or float16.")
        ids = ids.long().contiguous()
        out = torch.empty((*ids.shape, self.hidden), dtype=dtype, device="cpu")
        cast = state.ffi.cast
        status = state.lib.kt_embed(
            self.packed, cast("int64_t *", ids.data_ptr()), ids.numel(), cast("void *", out.data_ptr()), DTYPES[dtype]
        )
        if status == state.lib.KT_ERR_SHAPE and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            raise NativeError(f"{self.name}: found ids from {low} to {high}, expected 0 to {self.count - 1}.")
        state.check(status, self.name)
        return out
