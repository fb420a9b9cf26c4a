"""Floats to packed blocks: the inverse of `dequantize`, on all threads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError, UnsupportedError, WeightError
from ktransformers.native.checks import DTYPES, as_read, check_bytes, readable_tensor
from ktransformers.native.library import State, loaded, pooled
from ktransformers.quants.blocks import quant_type

if TYPE_CHECKING:
    from ktransformers.quants.blocks import QuantType


def encoded_types() -> list[str]:
    """Names of the types that `encode` writes."""
    state = loaded()
    return [name for name, number in state.type_ids.items() if state.lib.kt_encodes(number)]


def encode(
    tensor: torch.Tensor,
    kind: QuantType | str,
    importance: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode a float tensor [..., columns] as `kind`: uint8 [..., bytes per row], the same on any number of threads.

    `importance` [columns]: how much a squared error in each column counts; plain types and Q8_0 ignore it. `out`: uint8
    memory of just that size to write to and return. Blocks are those of native/src/templates/encode.h.

    Raises:
        WeightError: rows that are not whole blocks, numbers that are not finite or beyond the type's range.
        UnsupportedError: a type with no encoder.
        NativeError: what is no such tensor, or the C library is not built.
    """
    kind = quant_type(kind)
    state, pool = pooled()
    number = state.type_ids.get(kind.name, -1)
    if not state.lib.kt_encodes(number):
        raise UnsupportedError(f"No encoder for {kind.name}. There are {', '.join(encoded_types())}.")
    readable_tensor(tensor, "encode", "floats [..., columns]", movable=True)
    if not tensor.is_floating_point() or tensor.ndim < 1:
        raise NativeError(f"encode: found {tensor.dtype} {list(tensor.shape)}, expected floats [..., columns].")
    x = as_read(tensor, tensor.dtype if tensor.dtype in DTYPES else torch.float32)
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    nbytes = rows * kind.row_bytes(columns)
    if out is None:
        out = torch.empty((*x.shape[:-1], kind.row_bytes(columns)), dtype=torch.uint8, device="cpu")
    check_bytes(out, "encode (out)")
    if out.numel() != nbytes or (out.data_ptr() % min(4, kind.nbytes) and kind.torch_dtype is not None):
        raise NativeError(f"encode (out): found {out.numel()} bytes, expected {nbytes}, those of plain types aligned.")
    cast, keep = state.ffi.cast, _checked_importance(importance, columns)
    weights = state.ffi.NULL if keep is None else cast("float *", keep.data_ptr())
    status = state.lib.kt_encode(
        pool, number, cast("void *", x.data_ptr()), DTYPES[x.dtype], rows, columns, weights,
        cast("void *", out.data_ptr()), out.numel(),
    )  # fmt: skip
    _check(state, status, kind.name)
    return out


def _checked_importance(importance: Any, columns: int) -> torch.Tensor | None:
    if importance is None:
        return None
    expected = f"floats [{columns}]"
    readable_tensor(importance, "encode (importance)", expected, movable=True)
    if tuple(importance.shape) != (columns,) or not importance.is_floating_point():
        raise NativeError(
            f"encode (importance): found {importance.dtype} {list(importance.shape)}, expected {expected}."
        )
    importance = as_read(importance, torch.float32)
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise WeightError("encode (importance): found NaN, infinity or less than 0, expected numbers from 0 on.")
    return importance


def _check(state: State, status: int, name: str) -> None:
    lib = state.lib
    what = {lib.KT_ERR_VALUE: "the weights hold NaN or infinity", lib.KT_ERR_RANGE: "a number is too large for it"}
    if status in what:
        raise WeightError(f"Cannot encode as {name}: {what[status]}. Check the weights, or keep this tensor as F32.")
    state.check(status, f"encode as {name}")
