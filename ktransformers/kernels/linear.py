"""y = x W^T + b over packed words, any number of rows: which kernel computes is decided here.

Off a GPU, and without Triton, the reference of words.py computes: slow, and the same numbers.
"""

import torch
from torch import Tensor

from ktransformers.kernels import dequantize, dot, gemv
from ktransformers.kernels.compiler import cdiv, launchable
from ktransformers.kernels.words import Words

GEMV_ROWS = 2
DOT_ROWS = 128
"""Up to how many rows each kernel computes; beyond, numbers are made and multiplied by torch.mm.

From counts of instructions (tests/bench/KERNELS.md) and of bytes, not from a clock: the GEMV spends 4.4 a weight on one
row and 10 on four, the dot 8 to 11 on 16 to 64; numbers cost 4 bytes of traffic a weight more than words, once.
"""

DENSE_AT_ONCE = 1 << 25
"""Numbers made at a time for torch.mm."""


def linear(
    x: Tensor, words: Words, bias: Tensor | None = None, out: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """x [.., K] -> [.., N] in x's type. Allocates nothing when given `out` and a `workspace`.

    workspace: float32, `workspace_size(words, rows, x.dtype)` elements or more; kernels in turn may share one.
    """
    rows = x.reshape(-1, x.shape[-1])
    made = None if out is None else out.view(-1, out.shape[-1])
    if not launchable(x.device):
        made = gemv.reference(rows, words, bias, made)
    elif len(rows) == 0:
        made = x.new_empty(0, words.shape[0])
    elif len(rows) <= GEMV_ROWS:
        made = gemv.gemv(rows, words, bias, made, workspace)
    elif len(rows) <= DOT_ROWS:
        made = dot.dot(rows, words, bias, made, workspace)
    else:
        made = _dense(rows, words, bias, made, workspace)
    return made.view(*x.shape[:-1], words.shape[0]) if out is None else out


def workspace_size(words: Words, rows: int, x: torch.dtype = torch.bfloat16) -> int:
    """float32 elements that `linear` needs for so many rows."""
    if rows <= GEMV_ROWS:
        return gemv.workspace_size(words, rows)
    if rows <= DOT_ROWS:
        return dot.workspace_size(words, rows, x)
    return cdiv(_columns_at_once(words) * words.shape[1] * x.itemsize, 4)


def most_workspace(words: Words, x: torch.dtype = torch.bfloat16) -> int:
    """float32 elements that `linear` needs for any number of rows up to DOT_ROWS.

    The dot takes a block of up to 64 rows at a time, so its shares change where another block begins.
    """
    full = range(64, DOT_ROWS + 1, 64)
    return max(workspace_size(words, rows, x) for rows in (GEMV_ROWS, *full, DOT_ROWS))


def _columns_at_once(words: Words) -> int:
    n, k = words.shape
    return min(cdiv(n, 16) * 16, max(16, DENSE_AT_ONCE // k // 16 * 16))


def _dense(x: Tensor, words: Words, bias: Tensor | None, out: Tensor | None, workspace: Tensor | None) -> Tensor:
    """Some rows of W at a time: numbers [K, n], then torch.mm."""
    (n, k), step = words.shape, _columns_at_once(words)
    out = x.new_empty(len(x), n) if out is None else out
    numbers = gemv.sums_of(workspace, (workspace_size(words, len(x), x.dtype),), x.device).view(x.dtype)
    for start in range(0, n, step):
        width = min(step, n - start)
        piece = numbers[: k * width].view(k, width)
        dequantize.dequantize_into(piece, words, start)
        to = out[:, start : start + width]
        if bias is None:
            torch.mm(x, piece, out=to)
        else:
            torch.addmm(bias[start : start + width], x, piece, out=to)
    return out


def gradient(of_out: Tensor, words: Words) -> Tensor:
    """The gradient of x [.., K], from that of `linear`'s result [.., N]: its product with W, some rows at a time."""
    (n, k), step = words.shape, _columns_at_once(words)
    rows = of_out.reshape(-1, n)
    made = torch.zeros(len(rows), k, dtype=torch.float32, device=rows.device)
    for start in range(0, n, step):
        piece = rows[:, start : start + step]
        numbers = piece.new_empty(k, piece.shape[1])
        dequantize.dequantize_into(numbers, words, start)
        made += piece @ numbers.T
    return made.to(of_out.dtype).view(*of_out.shape[:-1], k)
