"""Attention over keys and values that lie in memory as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES, as_read, readable_tensor, whole_number
from ktransformers.native.library import State, pooled

PAGE = 64
"""Tokens of a page of the cache, as in native/src/attention/attend.h."""

Q8_0 = 3
"""KT_CACHE_Q8_0: bytes of GGUF's q8_0 blocks, 34 for 32 values."""


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    value_size: int | None = None,
    name: str = "attend",
) -> Tensor:
    """softmax(scale * q k^T) v: `q` [B, A, S, D], `keys` [B, C, T, D], `values` [B, C, T, V] -> fp32 [B, S, A, V].

    keys and values are float32, bfloat16, float16, or uint8: rows of q8_0 blocks. The S queries are the last of each
    sequence's `lengths` tokens (None: T) and see those before them, from `start` [B] on, the last `window` of them
    (0: all). `mask` [B, 1, S, T], bool: what is seen instead, of tokens from `start` on. `scale`: 1 / sqrt(D) if None.
    `sinks` [A] add e^sink to their head's denominator. `value_size`: only so many columns of values (MLA: keys and
    values share memory), V if None. A query that sees nothing gets zeros. No gradients.
    Raises NativeError.
    """
    return prepare(q, keys, values, scale, window, sinks, start, mask, lengths, value_size, name)()


class Call(NamedTuple):
    """A call of the library, checked and laid out: as often as wanted, into the same tensor."""

    state: State
    pool: Any
    args: Any
    held: list[Any]
    """What `args` points to."""
    out: Tensor
    name: str

    def __call__(self) -> Tensor:
        self.state.check(self.state.lib.kt_attention_core(self.pool, self.args), self.name)
        return self.out


def prepare(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    value_size: int | None = None,
    name: str = "attend",
) -> Call:
    """What `attend` calls."""
    q, keys, values = (_tensor(x, f"{name} ({what})") for x, what in ((q, "q"), (keys, "keys"), (values, "values")))
    batch, heads, queries, size = q.shape
    kind = _check_cache(q, keys, values, name)
    whole_number(window, 0, 2**30, f"{name} (window)")
    q = as_read(q.transpose(1, 2), torch.float32)  # [B, S, A, D]
    keys, values = keys.contiguous(), values.contiguous()
    width = _values_in(values.shape[3], kind)
    if value_size is not None:
        whole_number(value_size, 1, width, f"{name} (value_size)", " or None")
        width = value_size
    starts = [0] * batch if start is None else _checked(start, [batch], torch.int64, f"{name} (start)").tolist()
    if sinks is not None:
        sinks = _checked(sinks, [heads], None, f"{name} (sinks)").float()
    if mask is not None:
        mask = _checked(mask, [batch, 1, queries, keys.shape[2]], torch.bool, f"{name} (mask)")
    lengths = _lengths(lengths, batch, queries, keys.shape[2], name)
    out = torch.zeros(batch, queries, heads, width, dtype=torch.float32, device="cpu")

    state, pool = pooled()
    new, cast = state.ffi.new, state.ffi.cast
    keep: list[Any] = []
    rows = new("kt_attention_sequence[]", batch)
    for b, row in enumerate(rows):
        row.keys, row.key_head, row.key_row = _pages(state, keys[b], keep)
        row.values, row.value_head, row.value_row = _pages(state, values[b], keep)
        row.query, row.queries, row.start, row.length = b * queries, queries, starts[b], lengths[b]
        if mask is not None:
            row.mask, row.mask_row = cast("uint8_t *", mask[b].data_ptr()), mask.shape[3]
    args = new("kt_attention_args *")
    args.type, args.heads, args.kv_heads, args.size, args.value_size = kind, heads, keys.shape[1], size, width
    args.scale, args.window = size**-0.5 if scale is None else scale, window
    args.q, args.q_stride = cast("float *", q.data_ptr()), heads * size
    args.out, args.out_stride = cast("float *", out.data_ptr()), heads * width
    args.sinks = state.ffi.NULL if sinks is None else cast("float *", sinks.data_ptr())
    args.sequence, args.sequences = rows, batch
    return Call(state, pool, args, [*keep, rows, q, keys, values, sinks, mask], out, name)


def _tensor(x: Any, subject: str) -> Tensor:
    readable_tensor(x, subject, "a tensor of 4 dimensions")
    if x.ndim != 4 or 0 in x.shape[1:2] + x.shape[3:]:
        raise NativeError(f"{subject}: found shape {list(x.shape)}, expected 4 dimensions, heads and size not 0.")
    return x.detach()


def _checked(x: Any, shape: list[int], dtype: torch.dtype | None, subject: str) -> Tensor:
    readable_tensor(x, subject, f"a tensor {shape}")
    if list(x.shape) != shape or dtype not in (None, x.dtype):
        raise NativeError(f"{subject}: found {x.dtype} {list(x.shape)}, expected {dtype or 'floats'} {shape}.")
    return as_read(x, x.dtype)


def _values_in(width: int, kind: int) -> int:
    """Values in a row of `width` elements."""
    return width // 34 * 32 if kind == Q8_0 else width


def _check_cache(q: Tensor, keys: Tensor, values: Tensor, name: str) -> int:
    """The type of keys and values, which must fit q and each other."""
    kind = Q8_0 if keys.dtype == torch.uint8 else DTYPES.get(keys.dtype)
    if kind is None or values.dtype != keys.dtype:
        raise NativeError(
            f"{name} (keys, values): found {keys.dtype} and {values.dtype}, expected both float32, bfloat16, float16 "
            "or uint8 (q8_0 blocks)."
        )
    if not q.is_floating_point():
        raise NativeError(f"{name} (q): found {q.dtype}, expected floats.")
    if kind == Q8_0 and (keys.shape[3] % 34 or values.shape[3] % 34):
        raise NativeError(f"{name} (keys, values): found rows of {keys.shape[3]} and {values.shape[3]} bytes, expected "
                          "multiples of 34, a q8_0 block.")  # fmt: skip
    batch, heads, _, size = q.shape
    fits = keys.shape[:3] == values.shape[:3] and keys.shape[0] == batch and heads % keys.shape[1] == 0
    if not fits or _values_in(keys.shape[3], kind) != size:
        raise NativeError(
            f"{name}: found q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}; expected "
            "[B, A, S, D], [B, C, T, D], [B, C, T, V] with A a multiple of C."
        )
    return kind


def _lengths(lengths: Sequence[int] | None, batch: int, queries: int, cached: int, name: str) -> list[int]:
    found = [cached] * batch if lengths is None else list(lengths)
    if len(found) != batch:
        raise NativeError(f"{name} (lengths): found {len(found)} numbers, expected {batch}, one a sequence.")
    for n in found:
        whole_number(n, queries, cached, f"{name} (lengths)", ", at least the queries and at most what is cached")
    return found


def _pages(state: State, x: Tensor, keep: list[Any]) -> tuple[Any, int, int]:
    """Pointers to the pages of one sequence [C, T, D], bytes from a head to the next and from a token to the next."""
    row = x.shape[2] * x.element_size()
    starts = range(0, max(x.shape[1], 1), PAGE)
    pages = state.ffi.new("void *[]", [state.ffi.cast("void *", x.data_ptr() + t * row) for t in starts])
    keep.append(pages)
    return pages, x.shape[1] * row, row
