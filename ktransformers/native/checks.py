"""What Python tensors must be before C may read or write their memory. Knows no ffi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktransformers.errors import NativeError, is_whole

if TYPE_CHECKING:
    from ktransformers.quants.blocks import Packed

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Of activations, with their numbers in kt_dtype."""

MAX_THREADS = 1024
"""Of a pool, as in native/src/threads/threads.c; a test holds the two together."""


def whole_number(value: Any, low: int, high: int, subject: str, otherwise: str = "") -> None:
    if not is_whole(value, low, high):
        raise NativeError(f"{subject}: found {value!r}, expected a whole number from {low} to {high}{otherwise}.")


def readable_tensor(value: Any, subject: str, expected: str, movable: bool = False) -> torch.Tensor:
    """`value` as a tensor whose memory can be read: strided, with values, on the cpu (or elsewhere if `movable`)."""
    if not isinstance(value, torch.Tensor):
        raise NativeError(f"{subject}: found {type(value).__name__}, expected {expected}.")
    if value.is_nested or value.layout is not torch.strided:
        found = "nested" if value.is_nested else value.layout
        raise NativeError(f"{subject}: found a tensor that is {found}, expected {expected}, torch.strided.")
    if value.is_meta or not (movable or value.device.type == "cpu"):
        raise NativeError(f"{subject}: found a tensor on {value.device}, expected {expected} on the cpu.")
    return value


def as_read(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` with its values in order in memory, as C reads them."""
    return x.detach().to("cpu", dtype).resolve_neg().contiguous()


def read_floats(values: Any, shape: tuple[int, ...], subject: str) -> torch.Tensor:
    """`values`, a float tensor of just that shape on any device, as fp32 for C. Raises NativeError for another."""
    expected = f"float {list(shape)}"
    readable_tensor(values, subject, expected, movable=True)
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise NativeError(f"{subject}: found {values.dtype} {list(values.shape)}, expected {expected}.")
    return as_read(values, torch.float32)


def check_bytes(data: Any, subject: str) -> None:
    expected = "a contiguous uint8 tensor"
    readable_tensor(data, subject, expected)
    if data.dtype != torch.uint8 or not data.is_contiguous():
        raise NativeError(
            f"{subject}: found {data.dtype}, contiguous={data.is_contiguous()}, expected {expected} on the cpu."
        )


def packed_shape(weight: Packed, subject: str) -> tuple[int, ...]:
    """The shape of a Packed of any number of dimensions, after checking that it is one and its bytes are bytes."""
    name, shape = getattr(getattr(weight, "type", None), "name", None), getattr(weight, "shape", None)
    if not isinstance(name, str) or not isinstance(shape, tuple) or not hasattr(weight, "data"):
        raise NativeError(f"{subject}: found {type(weight).__name__}, expected a Packed (see ktransformers.quants).")
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise NativeError(f"{subject}: found shape {shape}, expected whole numbers from 1 on.")
    check_bytes(weight.data, f"{subject}, bytes")
    return shape


def checked_input(x: torch.Tensor, cols: int, subject: str) -> torch.Tensor:
    readable_tensor(x, subject, f"input [..., {cols}]")
    if x.dtype not in DTYPES:
        raise NativeError(f"{subject}: found input of {x.dtype}, expected float32, bfloat16 or float16.")
    if x.ndim < 1 or x.shape[-1] != cols:
        raise NativeError(f"{subject}: found input of shape {list(x.shape)}, expected last dimension {cols}.")
    return as_read(x, x.dtype)


def checked_output(out: Any, like: torch.Tensor, shape: list[int], name: str) -> None:
    expected = f"{like.dtype} {shape}, contiguous"
    readable_tensor(out, f"{name} (out)", expected)
    if out.dtype != like.dtype or list(out.shape) != shape or not out.is_contiguous() or out.is_neg():
        raise NativeError(
            f"{name} (out): found {out.dtype} {list(out.shape)}, contiguous={out.is_contiguous()}; expected {expected}."
        )
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    if begin < like.data_ptr() + like.nbytes and like.data_ptr() < end:
        raise NativeError(f"{name} (out): found memory shared with the input, expected a tensor of its own.")


def check_pinned(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Where there is a CUDA device, tensors (by role) that a stream copies must be in pinned memory: copies from and to
    any other are synchronous, and cannot be captured in a graph."""
    if not torch.cuda.is_available():
        return
    pageable = [role for role, tensor in tensors.items() if not tensor.is_pinned()]
    if pageable:
        raise NativeError(
            f"{name} ({', '.join(pageable)}): found memory that is not pinned, expected pinned memory, which a CUDA "
            "stream copies asynchronously. Make the tensors with pin_memory=True, or call .pin_memory()."
        )
