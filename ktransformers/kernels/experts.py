"""Routed experts over packed words: gate and up, the activation, down, and the weighted sum, for any number of tokens.

Few pairs of a token and an expert: a GEMV each, four launches, no sorting. Many: pairs are grouped by expert in blocks
of rows and multiplied by the matrix units, seven launches. Grids and buffers depend on the shape of the routing only,
so a captured graph serves any. An id outside 0..E-1 is skipped; an expert that a token names twice counts twice.
Letters: T tokens, H hidden, I intermediate, E experts, K experts per token; a pair is t * K + k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.kernels import combining, dot, gating, gemv, grouping
from ktransformers.kernels import words as w
from ktransformers.kernels.compiler import cdiv, launchable
from ktransformers.kernels.layouts import ROWS_OF_16, layout_of
from ktransformers.kernels.words import Words, dequantize
from ktransformers.native.experts import Glu

PAIRS_BY_GEMV = 32
"""Up to how many pairs each meets its expert alone: then few experts are named twice, and each is read once."""

PAIRS_AT_ONCE = 1 << 14
"""Pairs grouped at a time: bounds the buffers between the products."""


@dataclass(frozen=True)
class Experts:
    """E experts: gate [E, I, H] and up [E, I, H], or both in one [E, 2I, H], gate's rows first; down [E, H, I].

    first: (gate_up,), (gate, up), or (up,) where `glu` has no gate. Types may differ. Biases of `glu` on the device.
    Raises WeightError where shapes do not fit.
    """

    first: tuple[Words, ...]
    down: Words
    glu: Glu
    gated: bool = True

    def __post_init__(self) -> None:
        count, hidden, width = self.down.shape
        rows = sum(words.shape[1] for words in self.first)
        fits = all(words.shape[0] == count and words.shape[2] == hidden for words in self.first)
        fits = fits and all(words.order is None for words in (*self.first, self.down))
        if not fits or rows != width * (1 + self.gated):
            shapes = ", ".join(str(words) for words in self.first)
            raise WeightError(f"Experts of {shapes} and {self.down} on a GPU: the shapes do not fit each other.")

    @property
    def nbytes(self) -> int:
        return sum(words.nbytes for words in (*self.first, self.down))


# --- plans: everything that depends on shapes alone ------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Buffers of a call with `pairs`, one after the other in a float32 workspace: name -> (shape, dtype)."""

    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def size(self) -> int:
        return sum(self._elements(name) for name in self.buffers)

    def _elements(self, name: str) -> int:
        shape, dtype = self.buffers[name]
        return cdiv(math.prod(shape) * dtype.itemsize, 64) * 16

    def take(self, workspace: Tensor) -> dict[str, Tensor]:
        made, at = {}, 0
        for name, (shape, dtype) in self.buffers.items():
            flat = workspace[at : at + self._elements(name)].view(dtype)
            made[name] = flat[: math.prod(shape)].view(shape)
            at += self._elements(name)
        return made


def _few_plan(experts: Experts, pairs: int, x: torch.dtype) -> tuple[_Plan, gemv.Split, gemv.Split]:
    _, hidden, width = experts.down.shape
    first, second = gemv.split_of(experts.first[0], pairs), gemv.split_of(experts.down, pairs)
    rows = sum(words.shape[1] for words in experts.first)
    return _Plan({
        "first": ((first.shares, pairs, rows), torch.float32), "inner": ((pairs, 1, width), x),
        "second": ((second.shares, pairs, hidden), torch.float32),
    }), first, second  # fmt: skip


def _many_plan(experts: Experts, tokens: int, pairs: int, x: torch.dtype) -> tuple[_Plan, list[dot.Tiles], int]:
    """The tiles are of each part of `first`, and of down; the last number is rows of a block."""
    count, hidden, _ = experts.down.shape
    each = max(16, min(64, 1 << (cdiv(pairs, count) - 1).bit_length()))
    blocks = grouping.max_blocks(pairs, count, each)
    tiles = [dot.tiles_of(words, each, blocks) for words in (*experts.first, experts.down)]
    shares = max(tile.shares for tile in tiles[:-1])
    sums = lambda shares: torch.float32 if shares > 1 else x  # noqa: E731
    rows = sum(words.shape[1] for words in experts.first)
    plan = _Plan({
        "table": ((grouping.size(pairs, count, each),), torch.int32),
        "x": ((tokens, max(tile.per * tile.width for tile in tiles[:-1])), x),
        "first": ((shares, pairs, rows), sums(shares)),
        "inner": ((pairs, tiles[-1].per, tiles[-1].width), x),
        "second": ((tiles[-1].shares, pairs, hidden), sums(tiles[-1].shares)),
    })  # fmt: skip
    return plan, tiles, each


def workspace_size(experts: Experts, tokens: int, per_token: int, x: torch.dtype = torch.bfloat16) -> int:
    """float32 elements that `forward` needs for [tokens, per_token] ids."""
    step = _tokens_at_once(per_token)
    return max(_piece_size(experts, piece, per_token, x) for piece in (min(tokens, step), tokens % step))


def _piece_size(experts: Experts, tokens: int, per_token: int, x: torch.dtype) -> int:
    pairs = tokens * per_token
    if pairs == 0:
        return 0
    few = pairs <= PAIRS_BY_GEMV
    return (_few_plan(experts, pairs, x)[0] if few else _many_plan(experts, tokens, pairs, x)[0]).size


def _tokens_at_once(per_token: int) -> int:
    return max(1, PAIRS_AT_ONCE // max(1, per_token))


# --- the call --------------------------------------------------------------------------------------------------------


def forward(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """x [T, H], ids integers [T, K], weights floats [T, K] -> [T, H] in x's type. Allocates nothing when given buffers.

    workspace: float32, `workspace_size(experts, T, K, x.dtype)` elements or more.
    """
    _check(experts, x, ids, weights)
    if not launchable(x.device):
        made = reference(experts, x, ids, weights)
        return made if out is None else out.copy_(made)
    out = torch.empty_like(x) if out is None else out
    if ids.numel() == 0:
        return out.zero_()
    size = workspace_size(experts, *ids.shape, x.dtype)
    workspace = gemv.sums_of(workspace, (size,), x.device)
    step = _tokens_at_once(ids.shape[1])
    for start in range(0, len(x), step):
        piece = slice(start, start + step)
        compute = _few if ids[piece].numel() <= PAIRS_BY_GEMV else _many
        compute(experts, x[piece], ids[piece], weights[piece], out[piece], workspace)
    return out


def _check(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    fits = x.dim() == 2 and ids.dim() == 2 and x.shape[1] == experts.down.shape[1] and len(ids) == len(x)
    fits = fits and ids.shape == weights.shape and x.stride(1) == 1 and ids.is_contiguous() and weights.is_contiguous()
    if not fits or not {x.device, ids.device, weights.device} == {experts.down.device}:
        raise WeightError(
            f"x {list(x.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)} on {x.device}, expected "
            f"[T, {experts.down.shape[1]}], [T, K] and [T, K], contiguous, on {experts.down.device}."
        )


def _few(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, workspace: Tensor) -> None:
    plan, first, second = _few_plan(experts, ids.numel(), x.dtype)
    buffers, flat = plan.take(workspace), ids.view(-1)
    at = 0
    for words in experts.first:
        rows = words.shape[1]
        gemv.multiply(x, words, buffers["first"][:, :, at : at + rows], first, ids=flat, per_x=ids.shape[1])
        at += rows
    gating.activate(experts, buffers["first"], flat, buffers["inner"])
    gemv.multiply(buffers["inner"].squeeze(1), experts.down, buffers["second"], second, ids=flat)
    combining.combine(experts, buffers["second"], ids, weights, out)


def _many(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, workspace: Tensor) -> None:
    tokens, per_token = ids.shape
    plan, tiles, each = _many_plan(experts, tokens, ids.numel(), x.dtype)
    buffers = plan.take(workspace)
    blocks = grouping.group(ids, experts.down.shape[0], each, per_token, buffers["table"])
    at, shares = 0, len(buffers["first"])
    for words, tile in zip(experts.first, tiles[:-1], strict=True):
        rows = words.shape[1]
        arranged = dot.arrange(x, tile, buffers["x"].view(-1))
        dot.multiply(arranged, words, buffers["first"][: tile.shares, :, at : at + rows], tile, blocks=blocks)
        if tile.shares < shares:  # parts of different types may be cut differently
            buffers["first"][tile.shares :, :, at : at + rows].zero_()
        at += rows
    gating.activate(experts, buffers["first"], ids.view(-1), buffers["inner"])
    down = dot.Blocks(blocks.pairs, blocks.expert, blocks.start, blocks.stop, per_x=1)
    dot.multiply(buffers["inner"], experts.down, buffers["second"], tiles[-1], blocks=down)
    combining.combine(experts, buffers["second"], ids, weights, out)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What the kernels compute, in torch, in float32 throughout."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in torch.unique(ids).tolist():
        if not 0 <= e < experts.down.shape[0]:
            continue
        token, k = torch.nonzero(ids == e, as_tuple=True)
        first = torch.cat([x[token].float() @ dequantize(words.expert(e)).T for words in experts.first], 1)
        made = gating.reference(experts, first, e) @ dequantize(experts.down.expert(e)).T
        made = made + gating.row(experts.glu.down_bias, e)
        out.index_add_(0, token, made * weights[token, k].float().unsqueeze(1))
    return out.to(x.dtype)


def joined(gate: Sequence[Any], up: Sequence[Any], device: torch.device | str) -> tuple[Words, ...]:
    """Matrices of E experts as what `Experts.first` is: one weight where gate and up are of one type, else two."""
    if layout_of(gate[0]) != layout_of(up[0]) or gate[0].shape[0] % ROWS_OF_16:
        return w.from_experts(gate, device), w.from_experts(up, device)
    return (w.from_experts(gate, device, up),)
