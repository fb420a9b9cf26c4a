"""Decode of multi-head latent attention over a paged cache of latents: a tile is read once, and is key and value.

Queries are absorbed: they meet latents as they lie, and what comes out is still latent. Heads of a sequence share a
tile through the matrix units, blocks of heads through the L2 cache; the context is cut into shares (context.py).
Letters: B sequences, T new tokens of each, A heads, R size of a latent, P of the rotary part behind it, R + P is W.

A cache is [pages, 64, W] of floats. Or bytes, [pages, 64, row_bytes(R, P, group)]: R numbers in FP8 (e4m3), a float32
scale for every `group` of them, filled up to 16 bytes, P numbers in bf16; with groups of 128 that is FlashMLA's row of
656 bytes. Bits are decoded by shifts where a chip has no FP8. It halves memory; time it saves only where memory bounds,
as it takes two to three times the instructions of bf16.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import context as c
from ktransformers.kernels.compiler import cdiv, dot_type, jit, launch, launchable, tl
from ktransformers.kernels.context import (
    LOG2_E,
    Context,
    Cut,
    Tiles,
    block_of,
    grown,
    normed,
    seen_of,
    tiles_of_share,
)
from ktransformers.native.pages import PAGE

MOST_LATENTS = 512
"""Of R: a block of 16 heads then takes 8192 sums, what registers hold."""


def group_of(rank: int) -> int:
    """How many latents have one scale in a cache of FP8, unless somebody chooses: FlashMLA's 128 where they fit."""
    return 128 if rank % 128 == 0 and rank & (rank - 1) == 0 else rank


def row_bytes(rank: int, rope: int, group: int) -> int:
    """Bytes of a token in a cache of FP8."""
    return rank + scale_bytes(rank, group) + 2 * rope


def scale_bytes(rank: int, group: int) -> int:
    """Of a token's scales, with what makes them a multiple of 16."""
    return cdiv(rank // group, 4) * 16


@jit
def e4m3_value(code, FP8: tl.constexpr):
    """Each byte's number, float32, or where the chip does not know it, a 256th of it. There a NaN (0x7F) reads as 480:
    a latent that is none has a scale that is none."""
    if FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        half = ((code & 0x7F).to(tl.uint16) << 7) | ((code & 0x80).to(tl.uint16) << 8)
        return half.to(tl.float16, bitcast=True).to(tl.float32)


@jit
def latents_of(
    row, first, held,
    R: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Latents [BN, WIDTH], from number `first` on, of the tokens whose rows begin at `row` [BN, 1]; 0 of those that are
    not `held`."""
    column = first + tl.arange(0, WIDTH)[None, :]
    keep = held if R % WIDTH == 0 else held & (column < R)
    value = tl.load(row + column, mask=keep, other=0)
    if GROUP > 0:
        FACTOR: tl.constexpr = 1 if FP8 else 256
        value = e4m3_value(value, FP8)
        scales = (row + R).to(tl.pointer_type(tl.float32))
        if GROUP >= WIDTH or GROUP == R:
            value = value * (tl.load(scales + first // GROUP, mask=held, other=0) * FACTOR)
        else:
            GROUPS: tl.constexpr = WIDTH // GROUP
            scale = tl.load(scales + first // GROUP + tl.arange(0, GROUPS)[None, :], mask=held, other=0)
            value = tl.reshape(tl.reshape(value, [BN, GROUPS, GROUP]) * (scale * FACTOR)[:, :, None], [BN, WIDTH])
    return value.to(DOT)


@jit
def mla_kernel(
    q, cache, table, lengths, starts, out, weights, scale, A, rows, tokens, capacity, shares,
    q_batch, q_token, q_head, page_stride, row_stride, table_stride,
    R: tl.constexpr, P: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PIECE: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """q [B, T, A, W] -> out [B, S, T * A, R] and weights [B, S, T * A] of the shares, or the answer of one share.

    Grid (blocks of BH rows, S, B). Row t * A + a sees the tokens up to length - T + t. Scores are in base 2: `scale`
    has a factor log2(e).
    """
    b = tl.program_id(2).to(tl.int64)
    share = tl.program_id(1)
    first, length = seen_of(lengths, starts, b, tokens, capacity, 0)
    begin, end, each = tiles_of_share(first, length, shares, BN, LEAST)
    start = begin + share * each
    stop = tl.minimum(start + each, end)
    if (start >= stop) & (shares > 1):
        return
    row = tl.program_id(0) * BH + tl.arange(0, BH)
    row_keep = row < rows
    limit = length - tokens + 1 + row // A
    column = tl.arange(0, BR)[None, :]
    rope = tl.arange(0, BP)[None, :]
    q_row = q + b * q_batch + (row // A * q_token + row % A * q_head)[:, None]
    if PIECE == BR:
        q_latent = tl.load(q_row + column, mask=row_keep[:, None] & (column < R), other=0).to(DOT)
    q_rope = tl.load(q_row + R + rope, mask=row_keep[:, None] & (rope < P), other=0).to(DOT)
    most = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    sums = tl.zeros([BH, BR], tl.float32)
    for tile in range(start, stop):
        page = tl.load(table + b * table_stride + tile * BN // 64).to(tl.int64)
        token = tile * BN + tl.arange(0, BN)
        held = ((token >= first) & (token < length))[:, None]
        at = cache + page * page_stride + (token % 64)[:, None] * row_stride
        latents = latents_of(at, 0, held, R, BR, BN, GROUP, FP8, DOT)
        if GROUP == 0:
            rope_at = at + R
        else:
            rope_at = (at + R + (R // GROUP + 3) // 4 * 16).to(tl.pointer_type(tl.bfloat16))
        rope_keep = held if BP == P else held & (rope < P)
        rotary = tl.load(rope_at + rope, mask=rope_keep, other=0).to(DOT)
        scores = tl.dot(q_rope, rotary.T, input_precision="ieee")
        if PIECE == BR:
            scores = tl.dot(q_latent, latents.T, scores, input_precision="ieee") * scale
        else:
            for i in range(BR // PIECE):
                some = i * PIECE + tl.arange(0, PIECE)[None, :]
                q_some = tl.load(q_row + some, mask=row_keep[:, None] & (some < R), other=0).to(DOT)
                keys = latents_of(at, i * PIECE, held, R, PIECE, BN, GROUP, FP8, DOT)
                scores = tl.dot(q_some, keys.T, scores, input_precision="ieee")
            scores *= scale
        scores = tl.where((token[None, :] < limit[:, None]) & (token >= first)[None, :], scores, float("-inf"))
        most, total, p, factor = grown(scores, most, total)
        sums = tl.dot(p.to(DOT), latents, sums * factor[:, None], input_precision="ieee")
    mean, weight = normed(sums, most, total)
    at = (b * shares + share) * rows + row
    tl.store(out + at[:, None] * R + column, mean.to(out.dtype.element_ty), mask=row_keep[:, None] & (column < R))
    if weights is not None:
        tl.store(weights + at, weight, mask=row_keep)


# --- the call --------------------------------------------------------------------------------------------------------


def tiles_for(chip: str, rows: int, fp8: bool = False, wide: bool = False) -> Tiles:
    """For `rows` heads and tokens of a sequence. `wide`: float32, whose tiles take twice the memory.

    All that fit registers and shared memory without spills, as the compiler says (tests/kernels); which of them is
    chosen follows from counts, not from a clock. The number of a page is loaded ahead of the tile, so 3 stages have one
    buffer, 5 have two: one program has room on a multiprocessor of sm_86, 89 and 120, and shall read while it computes.
    More rows halve what is read through the L2 cache, which bounds 128 heads. RDNA keeps queries in registers, twice,
    and has no room for all of one.
    """
    if chip.startswith("gfx1"):
        return Tiles(16, 16, 8, 1, piece=64)
    if wide:
        return Tiles(16, 16, 8, 1)
    if not chip.startswith("sm_") or chip == "sm_75":
        return Tiles(16, 16, 4, 2)
    if fp8:
        return Tiles(16, 32, 8, 2, fp8=int(chip[3:]) >= 89)
    if rows < 32:
        return Tiles(16, 32, 8, 5)
    return Tiles(32, 32, 8, 5 if chip in ("sm_80", "sm_90") else 3)


def mla_decode(
    q: Tensor, cache: Tensor, context: Context, rank: int, scale: float, *, group: int = 0, out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, A, W], or [B, T, A, W] of the last T tokens of each sequence -> [B, (T,) A, R] in q's type.

    cache [pages, 64, W] in q's type, or uint8 with an FP8 scale for every `group` of R. A query that sees no token
    gives 0. Allocates nothing when given `out`, contiguous, and `workspace`, float32 of `workspace_size` elements.
    Raises UnsupportedError for what does not fit.
    """
    queries = q[:, None] if q.dim() == 3 else q
    _check(queries, cache, rank, group)
    context.check("MLA decode", queries)
    shape = (*q.shape[:-1], rank)
    if out is not None and (out.shape != shape or not out.is_contiguous()):
        raise UnsupportedError(f"MLA decode: found out {list(out.shape)}, expected {list(shape)}, contiguous.")
    if not launchable(q.device):
        made = reference(queries, cache, context, rank, scale, group).view(shape)
        return made if out is None else out.copy_(made)
    out = q.new_empty(shape) if out is None else out
    if out.numel() == 0:
        return out
    batch, tokens, heads, _ = queries.shape
    cut = _cut(queries, cache, context)
    if cut.shares == 1:
        compute(queries, cache, context, out, None, rank, scale, group, cut)
        return out
    sums, weights = c.results_of(workspace, batch, cut.shares, tokens * heads, rank, q)
    compute(queries, cache, context, sums, weights, rank, scale, group, cut)
    c.add(sums, weights, context, out, tokens, cut)
    return out


def workspace_size(q: Tensor, cache: Tensor, context: Context, rank: int) -> int:
    """float32 elements that `mla_decode` needs for tensors of these shapes on their device."""
    queries = q[:, None] if q.dim() == 3 else q
    batch, tokens, heads, _ = queries.shape
    return c.workspace_size(batch, _cut(queries, cache, context).shares, tokens * heads, rank)


def _cut(q: Tensor, cache: Tensor, context: Context) -> Cut:
    batch, tokens, heads, _ = q.shape
    fp8, wide = cache.dtype == torch.uint8, q.dtype == torch.float32
    tiles = tiles_for(c.chip_of(q.device), tokens * heads, fp8, wide)
    programs = batch * cdiv(tokens * heads, tiles.rows)
    return Cut(tiles, c.shares_of(q.device, programs, context.most))


def compute(
    q: Tensor, cache: Tensor, context: Context, out: Tensor, weights: Tensor | None, rank: int, scale: float,
    group: int, cut: Cut,
) -> None:  # fmt: skip
    """q [B, T, A, W]; out and weights of the shares, or the answer and None."""
    grid = (cdiv(q.shape[1] * q.shape[2], cut.tiles.rows), cut.shares, q.shape[0])
    launch(mla_kernel, grid, q.device, arguments(q, cache, context, out, weights, rank, scale, group, cut))


def arguments(
    q: Tensor, cache: Tensor, context: Context, out: Tensor, weights: Tensor | None, rank: int, scale: float,
    group: int, cut: Cut,
) -> dict[str, Any]:  # fmt: skip
    """What `mla_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    _, tokens, heads, width = q.shape
    block = block_of(rank)
    return {
        "q": q, "cache": cache, "table": context.table, "lengths": context.lengths, "starts": context.starts,
        "out": out, "weights": weights, "scale": scale * LOG2_E, "A": heads, "rows": tokens * heads, "tokens": tokens,
        "capacity": context.capacity, "shares": cut.shares, "q_batch": q.stride(0), "q_token": q.stride(1),
        "q_head": q.stride(2), "page_stride": cache.stride(0), "row_stride": cache.stride(1),
        "table_stride": context.table.stride(0), "R": rank, "P": width - rank, "BR": block,
        "BP": block_of(width - rank), "BH": cut.tiles.rows, "BN": cut.tiles.tokens,
        "PIECE": min(cut.tiles.piece or block, block), "GROUP": group, "FP8": cut.tiles.fp8, "DOT": dot_type(q),
        "LEAST": c.least_tiles(cut.tiles), "num_warps": cut.tiles.warps, "num_stages": cut.tiles.stages,
        "enable_fp_fusion": True,
    }  # fmt: skip


def _check(q: Tensor, cache: Tensor, rank: int, group: int) -> None:
    width = q.shape[-1]
    if q.dim() != 4 or not 0 < rank < width or rank > MOST_LATENTS or q.stride(3) != 1:
        raise UnsupportedError(
            f"MLA decode: found queries {list(q.shape)} with latents of {rank}, expected [B, (T,) heads, latent + "
            f"rotary part], contiguous in the last, with latents of at most {MOST_LATENTS}."
        )
    powers = rank & (rank - 1) == 0 and group & (group - 1) == 0
    if group and (rank % group or rank % 4 or (group != rank and not powers)):
        raise UnsupportedError(
            f"MLA decode: found FP8 latents of {rank} with a scale for every {group}, expected one scale for all, or "
            "powers of 2."
        )
    row, kind = (row_bytes(rank, width - rank, group), torch.uint8) if group else (width, q.dtype)
    fits = cache.dim() == 3 and cache.shape[1:] == (PAGE, row) and cache.stride(2) == 1 and cache.device == q.device
    if not fits or cache.dtype != kind:
        raise UnsupportedError(
            f"MLA decode: found a cache {list(cache.shape)} of {cache.dtype} on {cache.device}, expected "
            f"[pages, {PAGE}, {row}] of {kind} on {q.device}."
        )


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(q: Tensor, cache: Tensor, context: Context, rank: int, scale: float, group: int = 0) -> Tensor:
    """What the kernels compute, in torch, in float32. q [B, T, A, W]."""
    rows = c.gathered(cache, context)
    keys = (numbers(rows, rank, q.shape[-1] - rank, group) if group else rows.float())[:, :, None]
    seen = c.visible(context, q.shape[1])
    return c.attend(q.float(), keys, keys[..., :rank], seen, scale, None, 0.0).to(q.dtype)


def numbers(rows: Tensor, rank: int, rope: int, group: int) -> Tensor:
    """Rows of an FP8 cache [.., bytes] as float32 [.., R + P]."""
    parts = rows.split(
        [rank, 4 * (rank // group), rows.shape[-1] - rank - 4 * (rank // group) - 2 * rope, 2 * rope], -1
    )
    kinds = torch.float8_e4m3fn, torch.float32, torch.uint8, torch.bfloat16
    codes, scales, _, rotary = (part.contiguous().view(kind).float() for part, kind in zip(parts, kinds, strict=True))
    return torch.cat([(codes.unflatten(-1, (-1, group)) * scales[..., None]).flatten(-2), rotary], -1)
