"""The largest of many numbers."""

from __future__ import annotations

import torch

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES, as_read, readable_tensor
from ktransformers.native.library import loaded


def argmax(x: torch.Tensor) -> int:
    """Where the largest of `x` [N] of float32, bfloat16 or float16 is: the first of several, a NaN before all, as torch
    has it. Raises NativeError for another tensor."""
    state = loaded()
    readable_tensor(x, "argmax", "floats [N]")
    if x.dtype not in DTYPES or x.dim() != 1 or not x.numel():
        raise NativeError(f"argmax: found {x.dtype} {list(x.shape)}, expected float32, bfloat16 or float16 [N], N > 0.")
    x, at = as_read(x, x.dtype), state.ffi.new("int64_t *")
    state.check(state.lib.kt_argmax(state.ffi.cast("void *", x.data_ptr()), DTYPES[x.dtype], x.numel(), at), "argmax")
    return at[0]
