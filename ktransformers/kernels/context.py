"""What decode kernels share: a paged context cut into shares, and the results of the shares added up.

A program takes one share of a sequence's tokens and leaves a normed result and the logarithm of its weight; a second
kernel adds them in order, so that the answer is the same each time. How long a sequence is stands in device memory, so
a captured graph serves any lengths: shares that are empty write nothing and are not read. Logarithms are of base 2.
Letters: B sequences, T new tokens of each, A heads of queries, S shares, V size of a value; rows are T * A.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels.compiler import cdiv, jit, launch, multiprocessors, tl
from ktransformers.native.pages import PAGE

LOG2_E = 1.4426950408889634

LEAST_TOKENS = 128
"""That a share has at least: 16 heads of MLA write and read 66 KB of sums for the 147 KB of their latents."""

MOST_SHARES = 128


@jit
def seen_of(lengths, starts, b, tokens, capacity, WINDOW: tl.constexpr):
    """First token that any query of sequence `b` sees, and its length; never beyond its table of `capacity` tokens."""
    length = tl.minimum(tl.load(lengths + b), capacity)
    first = length * 0
    if starts is not None:
        first = tl.maximum(first, tl.load(starts + b))
    if WINDOW > 0:
        first = tl.maximum(first, length - tokens + 1 - WINDOW)
    return tl.minimum(first, tl.maximum(length, 0)), tl.maximum(length, 0)


@jit
def tiles_of_share(first, length, shares, BN: tl.constexpr, LEAST: tl.constexpr):
    """Tile of the first token, the tile behind the last, and tiles of each share but the last."""
    begin = first // BN
    end = tl.where(length > first, (length + BN - 1) // BN, begin)
    return begin, end, tl.maximum((end - begin + shares - 1) // shares, LEAST)


@jit
def grown(scores, most, total):
    """A step of the running softmax: scores [BH, BN] -> the largest so far, the sum, the weights, the sums' factor."""
    larger = tl.maximum(most, tl.max(scores, axis=1))
    base = tl.where(larger == float("-inf"), 0.0, larger)
    p = tl.exp2(scores - base[:, None])
    factor = tl.exp2(most - base)
    return larger, total * factor + tl.sum(p, axis=1), p, factor


@jit
def normed(sums, most, total):
    """What a share leaves: its mean of values [BH, V], and the logarithm of its weight [BH]."""
    unseen = total == 0
    divisor = tl.where(unseen, 1.0, total)
    mean = tl.where(unseen[:, None], 0.0, sums / divisor[:, None])
    return mean, tl.where(unseen, float("-inf"), most + tl.log2(divisor))


@jit
def add_kernel(
    sums, weights, lengths, starts, out, rows, V, shares, tokens, capacity,
    WINDOW: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """sums float32 [B, S, rows, V], weights [B, S, rows] -> out [B, rows, V]. Grid (rows, blocks of V, B).

    SHARES: S up to a power of two.
    """
    row = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    first, length = seen_of(lengths, starts, b, tokens, capacity, WINDOW)
    begin, end, each = tiles_of_share(first, length, shares, BN, LEAST)
    share = tl.arange(0, SHARES)
    used = share * each < end - begin
    at = (b * shares + share) * rows + row
    weight = tl.load(weights + at, mask=used, other=float("-inf"))
    most = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight, axis=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    keep = used[:, None] & (column < V)[None, :]
    value = tl.load(sums + at[:, None] * V + column[None, :], mask=keep, other=0)
    value = tl.sum(tl.where(keep, value * weight[:, None], 0), axis=0)
    value = tl.where(total == 0, 0.0, value / tl.where(total == 0, 1.0, total))
    tl.store(out + (b * rows + row) * V + column, value.to(out.dtype.element_ty), mask=column < V)


@dataclass(frozen=True)
class Tiles:
    """Rows and tokens of a tile, warps, stages of the loads.

    piece: how much of a query is held at a time; 0: all. fp8: the chip knows FP8's numbers.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    piece: int = 0
    fp8: bool = False


@dataclass(frozen=True)
class Cut:
    """A context cut into shares of whole tiles."""

    tiles: Tiles
    shares: int


@dataclass(frozen=True)
class Context:
    """The tokens that B sequences attend to, the same for all layers of a kind.

    table: int32 [B, pages of a sequence]. lengths: int32 [B], new tokens counted; more than the table holds is cut off.
    starts: int32 [B] or None, tokens before are neither seen nor read. longest: an upper bound of lengths, None for
    what the table holds; it decides how many shares there are, so a graph takes the most that it shall serve.
    """

    table: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    longest: int | None = None

    @property
    def capacity(self) -> int:
        return self.table.shape[1] * PAGE

    @property
    def most(self) -> int:
        return self.capacity if self.longest is None else min(self.longest, self.capacity)

    def check(self, what: str, q: Tensor) -> None:
        """q [B, T, A, D]. Raises UnsupportedError where this is not of its sequences."""
        vectors = [self.lengths] if self.starts is None else [self.lengths, self.starts]
        fits = self.table.dim() == 2 and len(self.table) == len(q) and self.table.stride(1) == 1
        fits = fits and all(v.shape == (len(q),) and v.is_contiguous() for v in vectors)
        if not fits or any(v.dtype != torch.int32 or v.device != q.device for v in (self.table, *vectors)):
            found = ", ".join(f"{v.dtype} {list(v.shape)} on {v.device}" for v in (self.table, *vectors))
            raise UnsupportedError(
                f"{what}: found a table, lengths (and starts) of {found}, expected int32 [{len(q)}, pages] and "
                f"[{len(q)}] on {q.device}."
            )


def add_arguments(
    sums: Tensor, weights: Tensor, context: Context, out: Tensor, tokens: int, cut: Cut, window: int = 0
) -> dict[str, Any]:
    """What `add_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    return {
        "sums": sums, "weights": weights, "lengths": context.lengths, "starts": context.starts, "out": out,
        "rows": sums.shape[2], "V": sums.shape[3], "shares": cut.shares, "tokens": tokens, "capacity": context.capacity,
        "WINDOW": window, "BN": cut.tiles.tokens, "LEAST": least_tiles(cut.tiles), "COLUMNS": _columns(cut),
        "SHARES": 1 << (cut.shares - 1).bit_length(), "num_warps": 4,
    }  # fmt: skip


def add(sums: Tensor, weights: Tensor, context: Context, out: Tensor, tokens: int, cut: Cut, window: int = 0) -> None:
    """Shares [B, S, rows, V] -> out [B, .., V]."""
    grid = (sums.shape[2], cdiv(sums.shape[3], _columns(cut)), sums.shape[0])
    launch(add_kernel, grid, out.device, add_arguments(sums, weights, context, out, tokens, cut, window))


# --- what depends on shapes and the device alone ---------------------------------------------------------------------


def least_tiles(tiles: Tiles) -> int:
    """That a share has."""
    return max(1, LEAST_TOKENS // tiles.tokens)


def _columns(cut: Cut) -> int:
    """Of a value, that a program of `add_kernel` has: with all shares 4096 numbers."""
    return min(128, 4096 >> (cut.shares - 1).bit_length())


def block_of(size: int) -> int:
    """Up to a power of two, and to what a dot takes."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def chip_of(device: torch.device) -> str:
    """Of an NVIDIA or AMD GPU its target, such as sm_90 or gfx942; else the kind of device."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def shares_of(device: torch.device, programs: int, longest: int, each: int = 1) -> int:
    """Shares of a context of at most `longest` tokens, where a share has `programs` programs and a multiprocessor
    holds `each`: as many as find room at once."""
    room = each * multiprocessors(device) // max(1, programs)
    return max(1, min(room, cdiv(longest, LEAST_TOKENS), MOST_SHARES))


def workspace_size(batch: int, shares: int, rows: int, value: int) -> int:
    """float32 elements for the shares' results; 0 where one share writes the answer."""
    return batch * shares * rows * (value + 1) if shares > 1 else 0


def results_of(
    workspace: Tensor | None, batch: int, shares: int, rows: int, value: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """sums [B, S, rows, V] and weights [B, S, rows], float32, in the beginning of a workspace or of their own."""
    size = workspace_size(batch, shares, rows, value)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=like.device)
    if workspace.dtype != torch.float32 or workspace.numel() < size or not workspace.is_contiguous():
        raise UnsupportedError(
            f"A workspace of {workspace.numel()} {workspace.dtype}, expected {size} float32 in order, "
            "as workspace_size says."
        )
    flat, cut = workspace.view(-1), batch * shares * rows * value
    return flat[:cut].view(batch, shares, rows, value), flat[cut:size].view(batch, shares, rows)


# --- the reference ---------------------------------------------------------------------------------------------------


def gathered(cache: Tensor, context: Context) -> Tensor:
    """cache [pages, 64, ..] -> [B, tokens of the table, ..]; pages that are none, -1, as the first."""
    return cache[context.table.long().clamp(min=0)].flatten(1, 2)


def visible(context: Context, tokens: int, window: int = 0) -> Tensor:
    """bool [B, T, tokens of the table]: which of them a query sees."""
    device = context.lengths.device
    at = torch.arange(context.capacity, device=device)
    length = context.lengths.clamp(0, context.capacity)
    limit = length[:, None] - tokens + 1 + torch.arange(tokens, device=device)
    seen = at < limit[..., None]
    if window:
        seen &= at >= limit[..., None] - window
    if context.starts is not None:
        seen &= at >= context.starts[:, None, None]
    return seen


def attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, sinks: Tensor | None, cap: float
) -> Tensor:
    """float32 q [B, T, A, D], keys [B, N, C, D], values [B, N, C, V], seen [B, T, N] -> [B, T, A, V]; 0 where nothing
    is seen. What is not seen may be NaN."""
    held = seen.any(1)[:, :, None, None]
    keys, values = keys.masked_fill(~held, 0), values.masked_fill(~held, 0)
    q = q.unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("btcgd,bncd->btcgn", q, keys).flatten(2, 3) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[1]]
    weights = weights.masked_fill(~seen.any(-1)[:, :, None, None], 0)
    return torch.einsum("btcgn,bncv->btcgv", weights.unflatten(2, q.shape[2:4]), values).flatten(2, 3)
