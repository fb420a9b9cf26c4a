"""y = x W^T for up to some hundred rows: words are decoded in registers and multiplied by the matrix units.

A word holds 4 to 16 codes of one column. Instead of spreading them over rows of a tile, a tile of words makes as many
tiles of weights, the c-th code of each word, and meets as many tiles of x, every 4th to 16th column from c on. A first
kernel puts these columns beside each other (`arrange`), so that they are loaded 16 bytes at a time and ahead of use.
Shares of K are added by gemv.py's second kernel.
With a table of blocks each block of rows meets a matrix of its own: that is experts.py's many tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktransformers.kernels.compiler import cdiv, dot_type, jit, launch, launchable, multiprocessors, tl, warp_size
from ktransformers.kernels.decoding import (
    bits_of_one,
    constants,
    group_of,
    of_expert,
    pointers,
    scale_and_minimum,
    value_at,
)
from ktransformers.kernels.gemv import add_shares, check, reference, sums_of
from ktransformers.kernels.layouts import PLANES
from ktransformers.kernels.words import Words

LINES = 16
"""Words along K of a tile: the least inner size of a dot."""


@jit
def arrange_kernel(x, out, order, K, X, x_stride, out_stride, PER: tl.constexpr, BLOCK: tl.constexpr):
    """x [M, K] -> out [M, PER, X]: columns c, PER + c, ... are line c, zeros from K on. Grid (blocks of X, M)."""
    row = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, PER)[None, :]
    at = line * PER + c
    keep = at < K
    if order is not None:
        at = tl.load(order + at, mask=keep, other=0)
    value = tl.load(x + row * x_stride + at, mask=keep, other=0)
    tl.store(out + row * out_stride + c * X + line, value, mask=line < X)


@jit
def dot_kernel(
    x, out, bias, block_expert, block_start, block_stop, pairs, plane0, plane1, scales, minima, d, dmin, table,
    M, N, P, K, rounds, X, x_stride, out_share, out_stride,
    PER_X: tl.constexpr, DOT: tl.constexpr,
    TO: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    MINIMUM: tl.constexpr, ZERO: tl.constexpr, ZERO_BIAS: tl.constexpr, VALUES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """x [.., PER0, X] as `arrange_kernel` leaves it -> out[share, row, N], float32 sums, or the result of one share.

    Grid (blocks of BN, blocks of BM rows, shares). With `block_expert` block b takes the pairs numbered block_start[b]
    to block_stop[b] in `pairs`, x[pair // PER_X] each, and writes out[.., pair]; nothing where block_expert[b] is -1.
    """
    PER0: tl.constexpr = 32 // BITS0
    PER1: tl.constexpr = 32 // BITS1 if BITS1 > 0 else PER0
    WORDS1: tl.constexpr = PER1 // PER0  # words of the first plane to one of the second
    FACTOR: tl.constexpr = 1 << (23 - TO)
    block = tl.program_id(1)
    share = tl.program_id(2)
    if block_expert is not None:
        expert = tl.load(block_expert + block).to(tl.int64)
        if expert < 0:
            return
        plane0, plane1, scales, minima, d, dmin = of_expert(
            plane0, plane1, scales, minima, d, dmin, expert, K, P, BITS0, BITS1, GROUP
        )
        at = tl.load(block_start + block) + tl.arange(0, BM)
        row_keep = at < tl.load(block_stop + block)
        rows = tl.load(pairs + at, mask=row_keep, other=0)
    else:
        rows = block * BM + tl.arange(0, BM)
        row_keep = rows < M
    columns = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    inside = columns < P
    lines = tl.arange(0, LINES)
    x_row = x + (rows // PER_X).to(tl.int64)[:, None] * x_stride
    one = bits_of_one(table)
    sums = tl.zeros([BM, BN], tl.float32)
    for i in range(rounds):
        line = (share * rounds + i) * LINES + lines
        k = line * PER0
        line_keep = k < K
        keep = line_keep[:, None] & inside
        low = tl.load(plane0 + line[:, None] * P + columns, mask=keep, other=0)
        high = low
        if BITS1 > 0:
            high = tl.load(plane1 + (line // WORDS1)[:, None] * P + columns, mask=keep, other=0)
            high = high >> (line % WORDS1 * (PER0 * BITS1))[:, None]
        scale, minimum = scale_and_minimum(
            scales, minima, d, dmin, group_of(k, GROUP)[:, None] * P + columns, (k // 256)[:, None] * P + columns, keep,
            SCALE, MINIMUM, ZERO, ZERO_BIAS,
        )  # fmt: skip
        if VALUES == "":
            scale = scale * FACTOR
            minimum = minimum + scale
        for c in tl.static_range(PER0):
            xk = tl.load(x_row + (X * c + line)[None, :], mask=row_keep[:, None], other=0)
            value = value_at(low, high, table, one, c, TO, BITS0, BITS1, VALUES)
            if VALUES == "E2M1":
                weight = value * 85070591730234615865843651857942052864.0 * scale  # 2^126
            elif VALUES == "E4M3":
                weight = value * 1329227995784915872903807060280344576.0 * scale  # 2^120
            elif VALUES == "IQ4":
                weight = value * scale
            else:
                weight = value * scale - minimum
            sums = tl.dot(xk.to(DOT), weight.to(DOT), sums, input_precision="ieee")
    column = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)
    to = out + share.to(tl.int64) * out_share + rows.to(tl.int64)[:, None] * out_stride + column
    tl.store(to, sums.to(out.dtype.element_ty), mask=row_keep[:, None] & (column < N))


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: programs of `rows` rows of x, `columns` rows of W and `rounds` tiles of words.

    per: codes of a word. width: words along K, all shares of them.
    """

    rows: int
    columns: int
    shares: int
    rounds: int
    per: int

    @property
    def width(self) -> int:
        return self.shares * self.rounds * LINES

    def sizes(self, rows: int, n: int, x: torch.dtype) -> tuple[int, int]:
        """float32 elements of a workspace: for x in its arrangement, and for the shares' sums."""
        arranged = cdiv(rows * self.per * self.width * x.itemsize, 64) * 16
        return arranged, self.shares * rows * n if self.shares > 1 else 0


def tiles_of(words: Words, rows: int, row_blocks: int | None = None) -> Tiles:
    """Tiles for `rows` rows of x, and shares of K where there would be fewer programs than multiprocessors."""
    n, columns = words.shape[-2:]
    bm = max(16, min(64, 1 << (rows - 1).bit_length()))
    per = 32 // PLANES[words.layout.bits][0]
    rounds = cdiv(columns, LINES * per)
    blocks = cdiv(n, 64) * (cdiv(rows, bm) if row_blocks is None else row_blocks)
    wanted = max(1, min(cdiv(2 * multiprocessors(words.device), blocks), rounds // 2))
    each = cdiv(rounds, wanted)
    return Tiles(bm, 64, cdiv(rounds, each), each, per)


def workspace_size(words: Words, rows: int, x: torch.dtype = torch.bfloat16) -> int:
    """float32 elements that `dot` needs: x in its arrangement, and the shares' sums."""
    return sum(tiles_of(words, rows).sizes(rows, words.shape[0], x))


def dot(
    x: Tensor, words: Words, bias: Tensor | None = None, out: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's type. Weights are rounded to x's type. Allocates nothing when given its buffers."""
    rows = check(x, words)
    if not launchable(x.device):
        return reference(x, words, bias, out)
    out = x.new_empty(rows, words.shape[0]) if out is None else out
    tiles = tiles_of(words, rows)
    sizes = tiles.sizes(rows, words.shape[0], x.dtype)
    workspace = sums_of(workspace, (sum(sizes),), x.device)
    arranged = arrange(x, tiles, workspace[: sizes[0]], words.order)
    if tiles.shares == 1:
        multiply(arranged, words, out, tiles, bias)
        return out
    sums = workspace[sizes[0] :].view(tiles.shares, rows, -1)
    multiply(arranged, words, sums, tiles)
    add_shares(sums, out, bias)
    return out


def arrange(x: Tensor, tiles: Tiles, workspace: Tensor, order: Tensor | None = None) -> Tensor:
    """x [M, K] as `dot_kernel` reads it, [M, per, width], in a float32 workspace."""
    shape = (x.shape[0], tiles.per, tiles.width)
    out = workspace.view(x.dtype)[: math.prod(shape)].view(shape)
    grid = (cdiv(tiles.width, 128), x.shape[0])
    launch(arrange_kernel, grid, x.device, arrange_arguments(x, out, order))
    return out


def arrange_arguments(x: Tensor, out: Tensor, order: Tensor | None = None) -> dict[str, Any]:
    """What `arrange_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "x": x, "out": out, "order": order, "K": x.shape[1], "X": out.shape[2], "x_stride": x.stride(0),
        "out_stride": out.stride(0), "PER": out.shape[1], "BLOCK": 128, "num_warps": 4,
    }  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """Which rows meet which expert. pairs: integers, numbers of pairs sorted by expert. Of each block, int32:
    expert, -1 for a block that is none, and where in `pairs` it starts and stops."""

    pairs: Tensor
    expert: Tensor
    start: Tensor
    stop: Tensor
    per_x: int


def multiply(
    x: Tensor, words: Words, out: Tensor, tiles: Tiles, bias: Tensor | None = None, blocks: Blocks | None = None
) -> None:
    """x from `arrange`; out [M, N], or [shares, M, N] float32; with `blocks` M is pairs."""
    row_blocks = cdiv(x.shape[0], tiles.rows) if blocks is None else blocks.expert.numel()
    grid = (cdiv(words.shape[-2], tiles.columns), row_blocks, tiles.shares)
    launch(dot_kernel, grid, x.device, arguments(x, words, out, tiles, bias, blocks))


def arguments(
    x: Tensor, words: Words, out: Tensor, tiles: Tiles, bias: Tensor | None = None, blocks: Blocks | None = None
) -> dict[str, Any]:
    """What `dot_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    weight = pointers(words)
    del weight["order"]
    table_of = {"block_expert": "expert", "block_start": "start", "block_stop": "stop", "pairs": "pairs"}
    return {
        "x": x, "out": out, "bias": bias,
        **{name: None if blocks is None else getattr(blocks, field) for name, field in table_of.items()},
        **weight, "M": x.shape[0], "N": words.shape[-2], "P": words.scales.shape[-1], "K": words.shape[-1],
        "rounds": tiles.rounds, "X": tiles.width, "x_stride": x.stride(0),
        "out_share": out.stride(0) if out.dim() == 3 else 0, "out_stride": out.stride(-2),
        "PER_X": 1 if blocks is None else blocks.per_x, "DOT": dot_type(x), **constants(words),
        "BM": tiles.rows, "BN": tiles.columns, "LINES": LINES,
        "num_warps": 128 // warp_size(x.device), "enable_fp_fusion": True,
    }  # fmt: skip
