"""Decode of attention over paged keys and values, few new tokens a sequence: multi-head, grouped and multi-query.

Query heads of a group, and all new tokens, share each tile of keys and values through the matrix units; the context is
cut into shares (context.py). Windows, sinks, soft caps. The same kernel computes pieces of a prompt on a long context.
Letters: B sequences, T new tokens of each, A heads of queries, C of keys and values, G = A / C, D and V sizes of a key
and a value. Rows of a head of keys are t * G + g.
"""

from dataclasses import dataclass
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

MOST_SIZE = 512
"""Of a key and a value."""


@jit
def gqa_kernel(
    q, keys, values, table, lengths, starts, sinks, out, weights, scale, cap, A, G, tokens, rows, capacity, shares,
    q_batch, q_token, q_head, key_page, key_token, key_head, value_page, value_token, value_head, table_stride,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """q [B, T, A, D] -> out [B, S, T * A, V] and weights [B, S, T * A] of the shares, or the answer of one share.

    Grid (blocks of BH of T * G rows, times C, S, B), `rows` being T * G. A row of token t sees the tokens up to
    length - T + t, the last WINDOW of them if that is not 0. Scores are in base 2: `scale`, and where CAPPED `cap`
    alone, has a factor log2(e).
    """
    b = tl.program_id(2).to(tl.int64)
    share = tl.program_id(1)
    blocks = (rows + BH - 1) // BH
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    row_keep = row < rows
    first, length = seen_of(lengths, starts, b, tokens, capacity, WINDOW)
    begin, end, each = tiles_of_share(first, length, shares, BN, LEAST)
    start = begin + share * each
    stop = tl.minimum(start + each, end)
    if (start >= stop) & (shares > 1):
        return
    token_of_row = row // G
    query_head = head * G + row % G
    limit = length - tokens + 1 + token_of_row
    column = tl.arange(0, BD)[None, :]
    q_at = q + b * q_batch + (token_of_row * q_token + query_head * q_head)[:, None] + column
    query = tl.load(q_at, mask=row_keep[:, None] & (column < D), other=0).to(DOT)
    most = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    if sinks is not None:
        if share == 0:
            most = tl.load(sinks + query_head, mask=row_keep, other=float("-inf")).to(tl.float32) * 1.4426950408889634
            total = tl.where(most == float("-inf"), 0.0, 1.0)
    sums = tl.zeros([BH, BV], tl.float32)
    value_column = tl.arange(0, BV)[None, :]
    # tiles that no row of this block sees
    last = tl.minimum(rows - 1, tl.program_id(0) % blocks * BH + BH - 1) // G
    stop = tl.minimum(stop, (tl.maximum(length - tokens + 1 + last, 0) + BN - 1) // BN)
    if WINDOW > 0:
        start = tl.maximum(
            start, tl.maximum(length - tokens + 1 + tl.program_id(0) % blocks * BH // G - WINDOW, 0) // BN
        )
    for tile in range(start, stop):
        page = tl.load(table + b * table_stride + tile * BN // 64).to(tl.int64)
        token = tile * BN + tl.arange(0, BN)
        held = ((token >= first) & (token < length))[:, None]
        at = (token % 64)[:, None]
        key_keep = held if BD == D else held & (column < D)
        key = tl.load(keys + page * key_page + head * key_head + at * key_token + column, mask=key_keep, other=0).to(
            DOT
        )
        scores = tl.dot(query, key.T, input_precision="ieee") * scale
        if CAPPED:  # tanh(x) is 1 - 2 / (e^2x + 1)
            scores = (1 - 2 / (tl.exp2(scores * 2.8853900817779268) + 1)) * cap
        seen = (token[None, :] < limit[:, None]) & (token >= first)[None, :]
        if WINDOW > 0:
            seen = seen & (token[None, :] >= limit[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        most, total, p, factor = grown(scores, most, total)
        value_keep = held if BV == V else held & (value_column < V)
        value_at = values + page * value_page + head * value_head + at * value_token + value_column
        value = tl.load(value_at, mask=value_keep, other=0).to(DOT)
        sums = tl.dot(p.to(DOT), value, sums * factor[:, None], input_precision="ieee")
    mean, weight = normed(sums, most, total)
    to = (b * shares + share) * (tokens * A) + token_of_row * A + query_head
    tl.store(
        out + to[:, None] * V + value_column, mean.to(out.dtype.element_ty), mask=row_keep[:, None] & (value_column < V)
    )
    if weights is not None:
        tl.store(weights + to, weight, mask=row_keep)


# --- the call --------------------------------------------------------------------------------------------------------


def tiles_for(chip: str, rows: int, size: int, wide: bool = False) -> Tiles:
    """For `rows` rows of a head and the larger of the sizes. `wide`: float32, whose tiles take twice the memory.

    What fits shared memory and registers without spills, as the compiler says (tests/kernels); chosen by that, not by a
    clock. RDNA holds queries in registers, twice: more than 256 values of a key do not fit there.
    """
    if chip.startswith("gfx1"):
        return Tiles(16, 32, 4, 2) if size <= 64 else Tiles(16, 16, 4, 2) if size <= 128 else Tiles(16, 16, 8, 1)
    size *= 1 + wide
    block = max(16, min(64 if size <= 128 else 32 if size <= 256 else 16, 1 << (rows - 1).bit_length()))
    if wide and size >= 256:
        return Tiles(16, 16, 8, 1)
    return Tiles(block, 64 if size <= 128 else 32 if size <= 256 else 16, 4, 3)


@dataclass(frozen=True)
class Scores:
    """What becomes of a product of a query and a key before the softmax.

    scale: its factor. window: tokens that a query sees, itself included; 0 for all. cap: scores become
    cap * tanh(score / cap); 0 for not. sinks: floats [A], logits without a value, or None.
    """

    scale: float
    window: int = 0
    cap: float = 0.0
    sinks: Tensor | None = None


def gqa_decode(
    q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores, *, out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, A, D], or [B, T, A, D] of the last T tokens of each sequence -> [B, (T,) A, V] in q's type.

    keys [pages, 64, C, D] and values [pages, 64, C, V] in q's type, sizes contiguous, other strides free. A query that
    sees no token gives 0. Allocates nothing when given `out`, contiguous, and `workspace`, float32 of `workspace_size`
    elements. Raises UnsupportedError for what does not fit.
    """
    queries = q[:, None] if q.dim() == 3 else q
    _check(queries, keys, values, scores)
    context.check("GQA decode", queries)
    shape = (*q.shape[:-1], values.shape[-1])
    if out is not None and (out.shape != shape or not out.is_contiguous()):
        raise UnsupportedError(f"GQA decode: found out {list(out.shape)}, expected {list(shape)}, contiguous.")
    if not launchable(q.device):
        made = reference(queries, keys, values, context, scores).view(shape)
        return made if out is None else out.copy_(made)
    out = q.new_empty(shape) if out is None else out
    if out.numel() == 0:
        return out
    batch, tokens, heads, _ = queries.shape
    cut = _cut(queries, keys, values, context, scores)
    if cut.shares == 1:
        compute(queries, keys, values, context, scores, out, None, cut)
        return out
    sums, weights = c.results_of(workspace, batch, cut.shares, tokens * heads, shape[-1], q)
    compute(queries, keys, values, context, scores, sums, weights, cut)
    c.add(sums, weights, context, out, tokens, cut, scores.window)
    return out


def workspace_size(q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores) -> int:
    """float32 elements that `gqa_decode` needs for tensors of these shapes on their device."""
    queries = q[:, None] if q.dim() == 3 else q
    batch, tokens, heads, _ = queries.shape
    shares = _cut(queries, keys, values, context, scores).shares
    return c.workspace_size(batch, shares, tokens * heads, values.shape[-1])


def _cut(q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores) -> Cut:
    batch, tokens, heads, size = q.shape
    rows = tokens * heads // keys.shape[2]
    tiles = tiles_for(c.chip_of(q.device), rows, max(size, values.shape[-1]), q.dtype == torch.float32)
    longest = min(context.most, scores.window + tokens + PAGE) if scores.window else context.most
    programs = batch * keys.shape[2] * cdiv(rows, tiles.rows)
    return Cut(tiles, c.shares_of(q.device, programs, longest, each=2))


def compute(
    q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores, out: Tensor, weights: Tensor | None,
    cut: Cut,
) -> None:  # fmt: skip
    """q [B, T, A, D]; out and weights of the shares, or the answer and None."""
    heads = keys.shape[2]
    grid = (heads * cdiv(q.shape[1] * q.shape[2] // heads, cut.tiles.rows), cut.shares, q.shape[0])
    launch(gqa_kernel, grid, q.device, arguments(q, keys, values, context, scores, out, weights, cut))


def arguments(
    q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores, out: Tensor, weights: Tensor | None,
    cut: Cut,
) -> dict[str, Any]:  # fmt: skip
    """What `gqa_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    _, tokens, heads, size = q.shape
    group, value_size, cap = heads // keys.shape[2], values.shape[-1], scores.cap
    return {
        "q": q, "keys": keys, "values": values, "table": context.table, "lengths": context.lengths,
        "starts": context.starts, "sinks": scores.sinks, "out": out, "weights": weights,
        "scale": scores.scale / cap if cap else scores.scale * LOG2_E, "cap": cap * LOG2_E, "A": heads, "G": group,
        "tokens": tokens, "rows": tokens * group, "capacity": context.capacity, "shares": cut.shares,
        "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2), "key_page": keys.stride(0),
        "key_token": keys.stride(1), "key_head": keys.stride(2), "value_page": values.stride(0),
        "value_token": values.stride(1), "value_head": values.stride(2), "table_stride": context.table.stride(0),
        "D": size, "V": value_size, "BD": block_of(size), "BV": block_of(value_size), "BH": cut.tiles.rows,
        "BN": cut.tiles.tokens, "WINDOW": scores.window, "CAPPED": bool(cap), "DOT": dot_type(q),
        "LEAST": c.least_tiles(cut.tiles), "num_warps": cut.tiles.warps, "num_stages": cut.tiles.stages,
        "enable_fp_fusion": True,
    }  # fmt: skip


def _check(q: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> None:
    if q.dim() != 4 or not 0 < q.shape[3] <= MOST_SIZE or q.stride(3) != 1:
        raise UnsupportedError(
            f"GQA decode: found queries {list(q.shape)}, expected [B, (T,) heads, size], contiguous in the last, of a "
            f"size of at most {MOST_SIZE}."
        )
    fits = all(x.dim() == 4 and x.shape[1] == PAGE and x.stride(3) == 1 and x.dtype == q.dtype for x in (keys, values))
    fits = fits and keys.device == values.device == q.device and keys.shape[:3] == values.shape[:3]
    fits = fits and keys.shape[3] == q.shape[3] and 0 < values.shape[3] <= MOST_SIZE
    if not fits or not keys.shape[2] or q.shape[2] % keys.shape[2]:
        raise UnsupportedError(
            f"GQA decode: found keys {list(keys.shape)} and values {list(values.shape)} of {keys.dtype} on "
            f"{keys.device}, expected [pages, {PAGE}, heads, {q.shape[3]}] and as many values, of {q.dtype} on "
            f"{q.device}, for {q.shape[2]} heads of queries."
        )
    sinks = scores.sinks
    if sinks is not None and (sinks.shape != (q.shape[2],) or sinks.device != q.device or not sinks.is_contiguous()):
        raise UnsupportedError(f"GQA decode: found sinks {list(sinks.shape)}, expected [{q.shape[2]}] on {q.device}.")


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(q: Tensor, keys: Tensor, values: Tensor, context: Context, scores: Scores) -> Tensor:
    """What the kernels compute, in torch, in float32. q [B, T, A, D]."""
    held_keys, held_values = c.gathered(keys, context).float(), c.gathered(values, context).float()
    seen = c.visible(context, q.shape[1], scores.window)
    return c.attend(q.float(), held_keys, held_values, seen, scores.scale, scores.sinks, scores.cap).to(q.dtype)
