"""Which rows meet which expert, made on the GPU: pairs sorted by expert, and a table of blocks of them.

No sort and no synchronisation: each expert counts its pairs, then places them after those of the experts before it.
Launches, grids and buffers depend on the numbers of tokens and experts only, so a captured graph serves any routing.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.kernels.compiler import jit, launch, tl
from ktransformers.kernels.dot import Blocks

CHUNK = 1024


@jit
def count_kernel(ids, counts, pairs, CHUNK: tl.constexpr):
    """ids [pairs] -> counts int32 [E], how often each expert is named. Grid (E)."""
    expert = tl.program_id(0)
    total = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, axis=0))


@jit
def place_kernel(
    ids, counts, sorted_pairs, block_expert, block_start, block_stop, pairs, experts, blocks,
    BM: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write each expert's pairs, in order, and its blocks of BM. Grid (E + 1): the last marks the blocks of nobody."""
    expert = tl.program_id(0)
    each = tl.arange(0, E)
    count = tl.load(counts + each, mask=each < experts, other=0)
    before = tl.where(each < expert, count, 0)
    place = tl.sum(before, axis=0)
    block = tl.sum((before + BM - 1) // BM, axis=0)
    own = tl.sum(tl.where(each == expert, count, 0), axis=0)
    if expert == experts:
        for first in range(block, blocks, CHUNK):
            at = first + tl.arange(0, CHUNK)
            tl.store(block_expert + at, -1 + 0 * at, mask=at < blocks)
        return
    stop = place + own
    for first in range(0, (own + BM - 1) // BM, CHUNK):
        at = first + tl.arange(0, CHUNK)
        keep = at < (own + BM - 1) // BM
        begin = place + at * BM
        tl.store(block_expert + block + at, expert + 0 * at, mask=keep)
        tl.store(block_start + block + at, begin, mask=keep)
        tl.store(block_stop + block + at, tl.minimum(begin + BM, stop), mask=keep)
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine = (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        tl.store(sorted_pairs + place + tl.cumsum(mine, axis=0) - 1, at, mask=mine > 0)
        place += tl.sum(mine, axis=0)


def max_blocks(pairs: int, experts: int, rows: int) -> int:
    """Blocks of `rows` that `pairs` can take at most, however they are routed."""
    return min(experts, pairs) + pairs // rows


def size(pairs: int, experts: int, rows: int) -> int:
    """int32 elements that `group` needs."""
    return experts + pairs + 3 * max_blocks(pairs, experts, rows)


def group(ids: Tensor, experts: int, rows: int, per_x: int, workspace: Tensor) -> Blocks:
    """ids [T, K], contiguous; what is not in 0..experts-1 is in no block. workspace: int32, `size` elements."""
    pairs = ids.numel()
    blocks = max_blocks(pairs, experts, rows)
    counts, order, *table = workspace[: size(pairs, experts, rows)].split([experts, pairs, blocks, blocks, blocks])
    launch(count_kernel, (experts,), ids.device, count_arguments(ids, counts))
    made = Blocks(order, *table, per_x)
    launch(place_kernel, (experts + 1,), ids.device, place_arguments(ids, counts, made, experts, rows))
    return made


def count_arguments(ids: Tensor, counts: Tensor) -> dict[str, Any]:
    return {"ids": ids, "counts": counts, "pairs": ids.numel(), "CHUNK": CHUNK, "num_warps": 4}


def place_arguments(ids: Tensor, counts: Tensor, blocks: Blocks, experts: int, rows: int) -> dict[str, Any]:
    return {
        "ids": ids, "counts": counts, "sorted_pairs": blocks.pairs, "block_expert": blocks.expert,
        "block_start": blocks.start, "block_stop": blocks.stop, "pairs": ids.numel(), "experts": experts,
        "blocks": blocks.expert.numel(), "BM": rows, "E": 1 << experts.bit_length(), "CHUNK": CHUNK, "num_warps": 4,
    }  # fmt: skip


def reference(ids: Tensor, experts: int, rows: int) -> list[tuple[int, list[int]]]:
    """The blocks in torch: (expert, its pairs) in order."""
    flat, made = ids.flatten(), []
    for e in range(experts):
        pairs = torch.nonzero(flat == e).flatten().tolist()
        made += [(e, pairs[at : at + rows]) for at in range(0, len(pairs), rows)]
    return made
