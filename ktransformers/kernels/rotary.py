"""Rotary positions of queries and keys in place, one launch for both, after the norm of each head where there is one.

The first n values of a head turn, the rest stays. Two that turn together lie half of n apart ("halves"), beside each
other ("neighbours"), or beside each other before and half of n apart after ("parted"): kt_pairs of native/kt_native.h.
Letters: T tokens, A heads of queries, C of keys, D size of a head.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, did_you_mean
from ktransformers.kernels.compiler import jit, launch, launchable, tl

PAIRS = ("halves", "neighbours", "parted")


@jit
def turn(
    at, to, weight, cos, sin, eps, D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
    PAIRS: tl.constexpr, ONE: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """One head, whose values begin at `at`, to `to`: the same place, or where MOVED, another."""
    pair = tl.arange(0, BH)
    keep = pair < HALF
    rest = 2 * HALF + tl.arange(0, BR)
    rest_keep = rest < D
    first = pair if PAIRS == "halves" else 2 * pair
    second = pair + HALF if PAIRS == "halves" else 2 * pair + 1
    x = tl.load(at + first, mask=keep, other=0).to(tl.float32)
    y = tl.load(at + second, mask=keep, other=0).to(tl.float32)
    if weight is not None or MOVED:
        z = tl.load(at + rest, mask=rest_keep, other=0).to(tl.float32)
    if weight is not None:
        factor = tl.rsqrt((tl.sum(x * x) + tl.sum(y * y) + tl.sum(z * z)) / D + eps)
        x *= factor * (tl.load(weight + first, mask=keep, other=0).to(tl.float32) + ONE)
        y *= factor * (tl.load(weight + second, mask=keep, other=0).to(tl.float32) + ONE)
        z *= factor * (tl.load(weight + rest, mask=rest_keep, other=0).to(tl.float32) + ONE)
    if weight is not None or MOVED:
        tl.store(to + rest, z.to(to.dtype.element_ty), mask=rest_keep)
    c = tl.load(cos + pair, mask=keep, other=0).to(tl.float32)
    s = tl.load(sin + pair, mask=keep, other=0).to(tl.float32)
    if PAIRS == "parted":
        if not MOVED:  # all are read before any is written
            tl.debug_barrier()
        first = pair
        second = pair + HALF
    tl.store(to + first, (x * c - y * s).to(to.dtype.element_ty), mask=keep)
    tl.store(to + second, (y * c + x * s).to(to.dtype.element_ty), mask=keep)


@jit
def rotary_kernel(
    q, k, positions, cos, sin, q_weight, k_weight, eps, A, q_token, q_head, k_token, k_head, angle_stride,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, PAIRS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """q [T, A, D] and k [T, C, D] in place; cos and sin [.., HALF], of token t or of its position. Grid (T, A + C)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = token if positions is None else tl.load(positions + token).to(tl.int64)
    cos += position * angle_stride
    sin += position * angle_stride
    if head < A:
        at = q + token * q_token + head * q_head
        turn(at, at, q_weight, cos, sin, eps, D, HALF, BH, BR, PAIRS, ONE, False)
    elif k is not None:
        at = k + token * k_token + (head - A) * k_head
        turn(at, at, k_weight, cos, sin, eps, D, HALF, BH, BR, PAIRS, ONE, False)


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, pairs: str = "halves",
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, plus_one: bool = False,
) -> None:  # fmt: skip
    """q [T, A, D] and k [T, C, D] or None, in place; values of a head contiguous, other strides free.

    cos, sin: floats [T, n / 2], each pair's once, or [positions, n / 2] with positions integers [T]: not checked
    against the table, as that would wait for the GPU. n is at most D. q_norm, k_norm: floats [D], RMSNorm of each head
    first, in float32 and rounded once with the rotation; plus_one: its factors are 1 + weight. Raises UnsupportedError
    for what does not fit.
    """
    check(q, k, cos, sin, positions, pairs, q_norm, k_norm)
    if not launchable(q.device):
        return reference(q, k, cos, sin, positions, pairs, q_norm, k_norm, eps, plus_one)
    grid = (q.shape[0], q.shape[1] + (0 if k is None else k.shape[1]))
    if grid[0] and grid[1]:
        made = arguments(q, k, cos, sin, positions, pairs, q_norm, k_norm, eps, plus_one)
        launch(rotary_kernel, grid, q.device, made)


def arguments(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None, pairs: str = "halves",
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, plus_one: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What `rotary_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "q": q, "k": k, "positions": positions, "cos": cos, "sin": sin, "q_weight": q_norm, "k_weight": k_norm,
        "eps": float(eps), "A": q.shape[1], "q_token": q.stride(0), "q_head": q.stride(1),
        "k_token": 0 if k is None else k.stride(0), "k_head": 0 if k is None else k.stride(1),
        "angle_stride": cos.stride(0), **sizes(q, cos), "PAIRS": pairs, "ONE": int(plus_one), "num_warps": 1,
    }  # fmt: skip


def sizes(q: Tensor, cos: Tensor) -> dict[str, int]:
    """What `turn` is told of a head's size, and what of it turns."""
    block = lambda size: 1 << (max(1, size) - 1).bit_length()  # noqa: E731
    size, half = q.shape[2], cos.shape[1]
    return {"D": size, "HALF": half, "BH": block(half), "BR": block(size - 2 * half)}


def check(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, pairs: str,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises UnsupportedError where these do not fit each other."""
    if pairs not in PAIRS:
        raise UnsupportedError(
            f"Rotary: found pairs {pairs!r}{did_you_mean(pairs, PAIRS)}, expected one of {', '.join(PAIRS)}."
        )
    heads = [q] if k is None else [q, k]
    tokens, size = q.shape[0], q.shape[-1]
    fits = all(
        x.dim() == 3 and x.shape[::2] == (tokens, size) and x.stride(2) == 1 and x.dtype == q.dtype for x in heads
    )
    fits = fits and cos.dim() == 2 and cos.shape == sin.shape and cos.stride() == sin.stride() and cos.stride(1) == 1
    fits = fits and 0 < 2 * cos.shape[1] <= size and len(cos) >= (tokens if positions is None else 1)
    fits = fits and (positions is None or (positions.shape == (tokens,) and positions.is_contiguous()))
    fits = fits and all(norm is None or (norm.shape == (size,) and norm.stride(0) == 1) for norm in (q_norm, k_norm))
    others = [x for x in (k, cos, sin, positions, q_norm, k_norm) if x is not None]
    if not fits or any(x.device != q.device for x in others):
        raise UnsupportedError(
            f"Rotary: found q {list(q.shape)}, k {None if k is None else list(k.shape)}, cos {list(cos.shape)} and sin "
            f"{list(sin.shape)}, expected [T, heads, D] of one type, [T or positions, at most D / 2] twice, norms [D]."
        )


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None, pairs: str = "halves",
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, plus_one: bool = False,
) -> None:  # fmt: skip
    """What the kernel computes, in torch, in place."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = (angle[: len(q), None].float() for angle in (cos, sin))
    for x, norm in ((q, q_norm), (k, k_norm)):
        if x is not None:
            x.copy_(_turned(x.float(), cos, sin, pairs, norm, eps, plus_one))


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: str, norm: Tensor | None, eps: float, plus_one: bool) -> Tensor:
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (norm.float() + plus_one)
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = turning.chunk(2, -1) if pairs == "halves" else (turning[..., ::2], turning[..., 1::2])
    made = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(made, -1).flatten(-2) if pairs == "neighbours" else torch.cat(made, -1)
    return torch.cat([turned, rest], -1)
