"""Weights as C sees them: a `kt_weight` filled from packed bytes, after checking that they are what they say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError, UnsupportedError, did_you_mean
from ktransformers.native.checks import packed_shape
from ktransformers.native.library import State, loaded
from ktransformers.quants.scaled import BLOCKS_IN_C, SCALED_IN_C

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed
    from ktransformers.quants.scaled import ScaledWeight

SUPPORTED_TYPES = BLOCKS_IN_C
"""Block formats with C kernels (with SCALED_TYPES the rows of traits.c; a test holds them together)."""

SCALED_TYPES = SCALED_IN_C
"""Types with C kernels with separate scales."""

SCALES = {"F32": 0, "F16": 1, "BF16": 2, "E8M0": 3, "E4M3": 4}
"""Names of kt_scale; a test holds them to the header."""


def fill_weight(state: State, weight: Packed, subject: str, keep: list[Any], into: Any, flat: bool = False) -> Any:
    """Fill the kt_weight `into` from a Packed matrix after checking it; `keep` holds what must stay alive.

    `flat`: any number of dimensions, seen as a matrix. Returns the shape.
    """
    if hasattr(weight, "scale_type"):
        return _scaled_weight(state, weight, subject, keep, into)
    shape = packed_shape(weight, subject)
    name, data = weight.type.name, weight.data
    if name not in state.type_ids:
        raise UnsupportedError(
            f"{subject}: weight type {name} has no C kernel{did_you_mean(name, state.type_ids)}. "
            f"Computed: {', '.join(sorted(state.type_ids))}. Use an operator that dequantizes (KLinearTorch)."
        )
    if len(shape) != 2 and not flat:
        raise NativeError(f"{subject}: found shape {shape}, expected a matrix [rows, cols].")
    type_id, rows, cols = state.type_ids[name], math.prod(shape[:-1]), shape[-1]
    block, size = state.lib.kt_type_block(type_id), state.lib.kt_type_block_bytes(type_id)
    if cols % block:
        raise NativeError(f"{subject}: found shape {shape}, expected cols to be a multiple of {block} ({name}).")
    needed = rows * (cols // block) * size
    if data.numel() != needed:
        raise NativeError(f"{subject}: found {data.numel()} bytes, expected {needed} for {name} {list(shape)}.")
    into.type, into.rows, into.cols = type_id, rows, cols
    into.data, into.bytes = state.ffi.cast("void *", data.data_ptr()), data.numel()
    keep.append(data)
    return shape


def _scaled_weight(state: State, weight: ScaledWeight, subject: str, keep: list[Any], into: Any) -> Any:
    """The same for a weight with separate scales. C checks the sizes; here only that memory is memory."""
    name, cast = weight.type.name, state.ffi.cast
    if name not in state.type_ids or weight.scale_type not in SCALES or len(weight.shape) != 2:
        raise UnsupportedError(
            f"{subject}: found {name} {list(weight.shape)} with scales of {weight.scale_type}, expected a matrix of "
            f"{', '.join(sorted(SCALED_TYPES))} with scales of {', '.join(SCALES)}."
        )
    for part in (weight.data, weight.scales, weight.zeros):
        if part is not None and (part.device.type != "cpu" or part.dtype != torch.uint8 or part.stride(-1) != 1):
            raise NativeError(f"{subject}: found {part.dtype} on {part.device}, expected rows of uint8 on the cpu.")
    into.type, (into.rows, into.cols) = state.type_ids[name], weight.shape
    into.data, into.bytes, into.stride = cast("void *", weight.data.data_ptr()), weight.span, weight.stride
    into.scales, into.scale_bytes = cast("void *", weight.scales.data_ptr()), weight.scale_span
    into.scale_stride, into.scale_type = weight.scale_stride, SCALES[weight.scale_type]
    into.scale_rows, into.scale_cols, into.scale = weight.scale_rows, weight.scale_cols, weight.global_scale
    if weight.zeros is not None:
        into.zeros, into.zero_bytes = cast("void *", weight.zeros.data_ptr()), weight.zero_span
        into.zero_stride, into.zero_bias = weight.zero_stride, weight.zero_bias
    if weight.order is not None:
        if weight.order.dtype != torch.int32 or tuple(weight.order.shape) != weight.shape[1:]:
            found = f"{weight.order.dtype} {list(weight.order.shape)}"
            raise NativeError(f"{subject}: found column order {found}, expected int32 [{weight.shape[1]}].")
        into.order = cast("int32_t *", weight.order.contiguous().data_ptr())
    keep.append(weight)
    return tuple(weight.shape)


def dequantize(packed: Packed) -> torch.Tensor:
    """The values of a packed tensor of any number of dimensions in float32, computed by the C library; same shape."""
    state = loaded()
    w = state.ffi.new("kt_weight *")
    shape = fill_weight(state, packed, "dequantize", [], w, flat=True)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    state.check(state.lib.kt_dequantize(w, state.ffi.cast("float *", out.data_ptr())), "dequantize")
    return out
