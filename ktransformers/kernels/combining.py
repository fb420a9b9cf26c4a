"""A token's experts added up: shares, the bias of down, the routing weights. Pairs of unknown experts are not read."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktransformers.kernels.compiler import cdiv, jit, launch, tl

if TYPE_CHECKING:
    from ktransformers.kernels.experts import Experts

BLOCK = 512


@jit
def combine_kernel(
    sums, ids, weights, bias, out, width, experts, shares, share_stride, row_stride, out_stride,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [shares, pairs, width] -> out [T, width], pairs in order. Grid (blocks of columns, T)."""
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        pair = token * K + k
        expert = tl.load(ids + pair).to(tl.int64) + column * 0  # as a tile: the interpreter confuses masks of one
        known = keep & (expert >= 0) & (expert < experts)
        value = tl.zeros([BLOCK], tl.float32)
        at = sums + pair.to(tl.int64) * row_stride + column
        for _ in range(shares):
            value += tl.load(at, mask=known, other=0).to(tl.float32)
            at += share_stride
        if bias is not None:
            value += tl.load(bias + expert * width + column, mask=known, other=0).to(tl.float32)
        total += tl.where(known, tl.load(weights + pair).to(tl.float32) * value, 0)
    tl.store(out + token.to(tl.int64) * out_stride + column, total.to(out.dtype.element_ty), mask=keep)


def combine(experts: "Experts", sums: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """sums [shares, T * K, H], ids and weights [T, K] -> out [T, H]."""
    grid = (cdiv(out.shape[1], BLOCK), len(out))
    launch(combine_kernel, grid, out.device, arguments(experts, sums, ids, weights, out))


def arguments(experts: "Experts", sums: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> dict[str, Any]:
    """What `combine_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "sums": sums, "ids": ids, "weights": weights, "bias": experts.glu.down_bias, "out": out, "width": out.shape[1],
        "experts": experts.down.shape[0], "shares": sums.shape[0], "share_stride": sums.stride(0),
        "row_stride": sums.stride(1), "out_stride": out.stride(0), "K": ids.shape[1], "BLOCK": BLOCK, "num_warps": 4,
    }  # fmt: skip
