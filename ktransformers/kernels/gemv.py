"""y = x W^T for one to four rows: each word of W is read once, decoded in registers and multiplied at once.

Bound by the bytes of W where the instructions allow, so their number per weight counts (tests/bench/KERNELS.md). A
program takes some rows of W and a share of K; the shares' sums are added by a second kernel, in order, so that the
result is the same every time. With `ids` each row of x meets a matrix of its own: that is experts.py's one token.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.kernels.compiler import cdiv, jit, launch, launchable, multiprocessors, tl, warp_size
from ktransformers.kernels.decoding import (
    bits_of_one,
    constants,
    group_of,
    of_expert,
    pointers,
    scale_and_minimum,
    value_at,
)
from ktransformers.kernels.words import Words, dequantize

MAX_ROWS = 4
LINES = 4
STEP = 32
"""A program takes LINES steps of STEP columns side by side, each by 32 threads."""


@jit
def gemv_kernel(
    x, out, bias, ids, plane0, plane1, scales, minima, d, dmin, table, order,
    N, P, K, experts, rounds, x_stride, out_share, out_stride,
    M: tl.constexpr, ROWS: tl.constexpr, PER_X: tl.constexpr,
    TO: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    MINIMUM: tl.constexpr, ZERO: tl.constexpr, ZERO_BIAS: tl.constexpr, VALUES: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """x [.., K] -> out[share, row, N], float32 sums, or the result of one share.

    Grid (blocks of BN, shares, pairs). Without `ids` one pair, ROWS rows of x, M being ROWS up to a power of two. With
    `ids` each pair has one row, x[pair // PER_X], and the matrix ids[pair]; outside 0..experts-1 nothing is written.
    Beyond K the last columns are read again and count nothing, their scales being 0: a mask costs a branch on AMD.
    """
    STEP: tl.constexpr = 32
    SUB: tl.constexpr = STEP if GROUP == 0 or GROUP > STEP else GROUP
    PER0: tl.constexpr = 32 // BITS0
    PER1: tl.constexpr = 32 // BITS1 if BITS1 > 0 else STEP
    FACTOR: tl.constexpr = 1 << (23 - TO)
    share = tl.program_id(1)
    pair = tl.program_id(2)
    if ids is not None:
        expert = tl.load(ids + pair).to(tl.int64)
        if (expert < 0) | (expert >= experts):
            return
        plane0, plane1, scales, minima, d, dmin = of_expert(
            plane0, plane1, scales, minima, d, dmin, expert, K, P, BITS0, BITS1, GROUP
        )
    columns = tl.program_id(0) * BN + tl.arange(0, BN)[None, None, :]
    inside = None if EVEN else columns < P
    other = None if EVEN else 0
    lines = tl.arange(0, LINES)[None, :, None]
    rows = tl.minimum(tl.arange(0, M)[:, None, None], ROWS - 1)
    x += (pair // PER_X + rows) * x_stride
    one = bits_of_one(table)
    sums = tl.zeros([M, LINES, BN], tl.float32)
    for i in range(rounds):
        step = (share * rounds + i) * LINES + lines
        keep = (columns < P) & (step < K // STEP)
        step = tl.minimum(step, K // STEP - 1)
        k = step * STEP
        x_at = x + k
        low_at = plane0 + (step * BITS0 * P + columns)
        if BITS1 > 0:
            high_at = plane1 + (step * BITS1 * P + columns)
        for c in tl.static_range(STEP):
            if c % PER0 == 0:
                low = tl.load(low_at + c // PER0 * P, mask=inside, other=other)
                high = low
            if BITS1 > 0 and c % PER1 == 0:
                high_word = tl.load(high_at + c // PER1 * P, mask=inside, other=other)
            if BITS1 > 0 and c % PER0 == 0:
                high = high_word >> (c % PER1 * BITS1)
            if c % SUB == 0:
                dot = tl.zeros([M, LINES, BN], tl.float32)
                total = tl.zeros([M, LINES, 1], tl.float32)
            if order is not None:
                xk = tl.load(x + tl.load(order + k + c)).to(tl.float32)
            else:
                xk = tl.load(x_at + c).to(tl.float32)
            if VALUES == "E2M1" or VALUES == "E4M3":
                xk *= 79228162514264337593543950336.0  # 2^96: the values are 2^-126 or 2^-120 too small
            dot += value_at(low, high, table, one, c % PER0, TO, BITS0, BITS1, VALUES) * xk
            total += xk
            if c % SUB == SUB - 1:
                line = group_of(k + (c - SUB + 1), GROUP)
                scale, minimum = scale_and_minimum(
                    scales, minima, d, dmin, line * P + columns, k // 256 * P + columns, keep,
                    SCALE, MINIMUM, ZERO, ZERO_BIAS,
                )  # fmt: skip
                if VALUES == "E2M1":
                    sums += dot * 1073741824.0 * scale  # 2^30
                elif VALUES == "E4M3":
                    sums += dot * 16777216.0 * scale  # 2^24
                elif VALUES == "IQ4":
                    sums += dot * scale
                else:
                    sums += (dot - total) * FACTOR * scale - minimum * total
    result = tl.sum(sums, axis=1)
    row = tl.arange(0, M)[:, None]
    column = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)
    to = out + share.to(tl.int64) * out_share + (pair + row) * out_stride + column
    tl.store(to, result.to(out.dtype.element_ty), mask=(row < ROWS) & (column < N))


@jit
def add_shares_kernel(sums, out, bias, N, shares, split, out_stride, BN: tl.constexpr):
    """sums float32 [shares, rows, N] -> out [rows, N], in order, and the bias. Grid (blocks of BN, rows)."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    keep = column < N
    row = tl.program_id(1)
    result = tl.zeros([BN], tl.float32)
    sums += row * N
    for _ in range(shares):
        result += tl.load(sums + column, mask=keep, other=0)
        sums += split
    if bias is not None:
        result += tl.load(bias + column, mask=keep, other=0).to(tl.float32)
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Split:
    """How a product is cut: programs of `block` rows of W and `rounds` times 128 columns, so `shares` of K."""

    block: int
    shares: int
    rounds: int


def split_of(words: Words, pairs: int = 1) -> Split:
    """As many programs as keep every multiprocessor at work, but two rounds each; wide ones where these are enough.

    256 rows take a tenth fewer instructions than 128, as more of them share what is done to x.
    """
    rows, columns = words.shape[-2:]
    rounds, enough = cdiv(columns, STEP * LINES), 4 * multiprocessors(words.device)
    block = 256 if cdiv(rows, 256) * pairs * max(1, rounds // 2) >= enough else 128
    wanted = max(1, min(cdiv(enough, cdiv(rows, block) * pairs), rounds // 2))
    each = cdiv(rounds, wanted)
    return Split(block, cdiv(rounds, each), each)


def workspace_size(words: Words, rows: int) -> int:
    """float32 elements that `gemv` needs for its shares' sums."""
    shares = split_of(words).shares
    return shares * rows * words.shape[0] if shares > 1 else 0


def gemv(
    x: Tensor, words: Words, bias: Tensor | None = None, out: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """x [M, K], M of 1 to 4 -> [M, N] in x's type. Allocates nothing where `out` and `workspace` are given.

    workspace: float32, `workspace_size(words, M)` elements or more. The columns of x are contiguous.
    """
    rows = check(x, words, MAX_ROWS)
    if not launchable(x.device):
        return reference(x, words, bias, out)
    out = x.new_empty(rows, words.shape[0]) if out is None else out
    split = split_of(words)
    if split.shares == 1:
        multiply(x, words, out, split, bias)
        return out
    sums = sums_of(workspace, (split.shares, rows, words.shape[0]), x.device)
    multiply(x, words, sums, split)
    add_shares(sums, out, bias)
    return out


def multiply(
    x: Tensor, words: Words, out: Tensor, split: Split, bias: Tensor | None = None,
    ids: Tensor | None = None, per_x: int = 1,
) -> None:  # fmt: skip
    """out [M, N], or [shares, M, N] float32; with `ids` [pairs] M is pairs."""
    grid = (cdiv(words.shape[-2], split.block), split.shares, 1 if ids is None else ids.numel())
    launch(gemv_kernel, grid, x.device, arguments(x, words, out, split, bias, ids, per_x))


def arguments(
    x: Tensor, words: Words, out: Tensor, split: Split, bias: Tensor | None = None,
    ids: Tensor | None = None, per_x: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """What `gemv_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    rows, columns = words.shape[-2:]
    m = x.shape[0] if ids is None else 1
    return {
        "x": x, "out": out, "bias": bias, "ids": ids, **pointers(words), "N": rows, "P": words.scales.shape[-1],
        "K": columns, "experts": words.shape[0] if len(words.shape) == 3 else 1, "rounds": split.rounds,
        "x_stride": x.stride(0), "out_share": out.stride(0) if out.dim() == 3 else 0, "out_stride": out.stride(-2),
        "M": 1 << (m - 1).bit_length(), "ROWS": m, "PER_X": per_x, **constants(words),
        "EVEN": words.scales.shape[-1] % split.block == 0,
        "BN": split.block, "LINES": LINES, "num_warps": LINES * 32 // warp_size(words.device), "enable_fp_fusion": True,
    }  # fmt: skip


def add_shares(sums: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """float32 [shares, M, N] -> out [M, N]."""
    grid = (cdiv(sums.shape[2], 512), sums.shape[1])
    launch(add_shares_kernel, grid, sums.device, add_shares_arguments(sums, out, bias))


def add_shares_arguments(sums: Tensor, out: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    """What `add_shares_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "sums": sums, "out": out, "bias": bias, "N": sums.shape[2], "shares": sums.shape[0], "split": sums.stride(0),
        "out_stride": out.stride(0), "BN": 512, "num_warps": 4,
    }  # fmt: skip


def sums_of(workspace: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 `shape` in the beginning of a workspace, or of its own."""
    size = math.prod(shape)
    if workspace is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if workspace.dtype != torch.float32 or workspace.numel() < size or not workspace.is_contiguous():
        raise WeightError(f"A workspace of {workspace.numel()} {workspace.dtype}, expected {size} float32 in order.")
    return workspace.view(-1)[:size].view(shape)


def check(x: Tensor, words: Words, most: int | None = None) -> int:
    """The rows of x. Raises WeightError where it does not fit the weight."""
    fits = x.dim() == 2 and len(words.shape) == 2 and x.shape[1] == words.shape[1] and x.stride(1) == 1
    if not fits or x.device != words.device or not 1 <= len(x) <= (most or len(x)):
        raise WeightError(
            f"x {list(x.shape)} on {x.device}, expected [{f'1 to {most}' if most else 'M'}, {words.shape[-1]}] on "
            f"{words.device}, columns contiguous, for {words}."
        )
    return len(x)


def reference(x: Tensor, words: Words, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """What the kernels compute, in torch: float32 numbers, float32 sums, rounded once."""
    made = x.float() @ dequantize(words).T
    made = made if bias is None else made + bias.float()
    return made.to(x.dtype) if out is None else out.copy_(made)
