"""Words to numbers on a GPU, a few hundred columns at a time: what many rows are multiplied with by torch.mm.

Every product and difference rounds once, as in words.dequantize: in float32 the same bits. Codes are converted, as here
it is the memory that takes the time.
"""

from typing import Any

from torch import Tensor

from ktransformers.kernels.compiler import cdiv, jit, launch, launchable, tl
from ktransformers.kernels.decoding import (
    bits_of_one,
    code_at,
    constants,
    group_of,
    pointers,
    scale_and_minimum,
    value_at,
)
from ktransformers.kernels.words import Words, dequantize

LINES, COLUMNS = 16, 128


@jit
def dequantize_kernel(
    out, plane0, plane1, scales, minima, d, dmin, table, order,
    start, stop, P, K, out_stride,
    TO: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    MINIMUM: tl.constexpr, ZERO: tl.constexpr, ZERO_BIAS: tl.constexpr, VALUES: tl.constexpr,
    BN: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Rows `start` to `stop` of W -> out [K, stop - start]. Grid (blocks of BN, blocks of LINES words along K)."""
    PER0: tl.constexpr = 32 // BITS0
    WORDS1: tl.constexpr = BITS0 // BITS1 if BITS1 > 0 else 1
    at = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    columns = start + at
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None]
    k = line * PER0
    keep = (k < K) & (columns < stop)
    low = tl.load(plane0 + line * P + columns, mask=keep, other=0)
    high = low
    if BITS1 > 0:
        high = tl.load(plane1 + line // WORDS1 * P + columns, mask=keep, other=0)
        high = high >> (line % WORDS1 * (PER0 * BITS1))
    group = group_of(k, GROUP) * P + columns
    scale, minimum = scale_and_minimum(
        scales, minima, d, dmin, group, k // 256 * P + columns, keep, SCALE, MINIMUM, ZERO, ZERO_BIAS
    )
    zero = low * 0.0 + ZERO
    if MINIMUM == "ZEROS":
        zero = tl.load(minima + group, mask=keep, other=0).to(tl.float32) + ZERO_BIAS
    one = bits_of_one(table)
    for c in tl.static_range(PER0):
        if VALUES == "E2M1":
            value = value_at(low, high, table, one, c, TO, BITS0, BITS1, VALUES)
            value = value * 85070591730234615865843651857942052864.0  # 2^126
        elif VALUES == "E4M3":
            value = value_at(low, high, table, one, c, TO, BITS0, BITS1, VALUES)
            value = value * 1329227995784915872903807060280344576.0  # 2^120
        elif VALUES == "IQ4":
            value = value_at(low, high, table, one, c, TO, BITS0, BITS1, VALUES)
        else:
            value = code_at(low, high, 0, c, BITS0, BITS1, 0).to(tl.float32) - zero
        value = value * scale
        if (SCALE == "NIBBLES" or MINIMUM == "U8") or MINIMUM == "F16":
            value = value - minimum
        row = k + c
        if order is not None:
            row = tl.load(order + row, mask=row < K, other=0)
        to = out + row.to(tl.int64) * out_stride + at
        tl.store(to, value.to(out.dtype.element_ty), mask=keep)


def dequantize_into(out: Tensor, words: Words, start: int = 0) -> None:
    """Rows of a matrix from `start` on, as many as out [K, n] has columns, transposed."""
    if not launchable(words.device):
        out.copy_(dequantize(words)[start : start + out.shape[1]].T)
        return
    made = arguments(out, words, start)
    grid = (cdiv(out.shape[1], COLUMNS), cdiv(words.shape[1] * made["BITS0"], 32 * LINES))
    launch(dequantize_kernel, grid, out.device, made)


def arguments(out: Tensor, words: Words, start: int = 0) -> dict[str, Any]:
    """What the kernel is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "out": out, **pointers(words), "start": start, "stop": start + out.shape[1], "P": words.scales.shape[-1],
        "K": words.shape[-1], "out_stride": out.stride(0), **constants(words), "BN": COLUMNS, "LINES": LINES,
        "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
