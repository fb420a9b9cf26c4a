"""Caches in permuted pages with NaN wherever no token lies, and attention in plain float64 without pages. Not a test."""

import torch

from ktransformers.native.pages import PAGE

LENGTHS = [0, 1, 63, 64, 65, 1000]
SHORT = [0, 1, 64, 65, 200]


def assert_close(ours, theirs, tolerance=2e-6):
    """Relative to the largest; measured 1e-7 to 1e-6."""
    error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))
    assert error < tolerance, f"relative error {error:.2e}"


def sequences_of(lengths, *shape, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=rng).to(dtype) for n in lengths]


def table_of(lengths, spare=1, seed=7):
    """int32 [B, pages], permuted; -1 behind the last page of each. And how many pages there are."""
    counts = [-(-n // PAGE) for n in lengths]
    numbers = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).int().split([*counts, 3])
    table = torch.full((len(lengths), max(counts) + spare), -1, dtype=torch.int32)
    for row, found in zip(table, numbers, strict=False):
        row[: len(found)] = found
    return table, sum(counts) + 3


def cache_of(sequences, table, pages):
    """[pages, 64, ..], NaN where no token is; bytes are 0xFF there, a NaN in FP8, in bf16 and in float32."""
    empty = 0xFF if sequences[0].dtype == torch.uint8 else float("nan")
    cache = torch.full((pages, PAGE, *sequences[0].shape[1:]), empty, dtype=sequences[0].dtype)
    for sequence, row in zip(sequences, table, strict=True):
        for i, piece in enumerate(sequence.split(PAGE)):
            cache[row[i], : len(piece)] = piece
    return cache


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def plain(q, keys, values, scale, window=0, sinks=None, cap=0.0, start=0):
    """q [T, A, D], keys [n, C, D], values [n, C, V] -> float64 [T, A, V], the queries being those of the last T tokens."""
    tokens, heads, _ = q.shape
    out = torch.zeros(tokens, heads, values.shape[-1], dtype=torch.float64)
    q, keys, values = q.double(), keys.double(), values.double()
    for t in range(tokens):
        stop = len(keys) - tokens + 1 + t
        begin = max(start, stop - window if window else 0, 0)
        for a in range(heads if stop > begin else 0):
            head = a // (heads // keys.shape[1])
            scores = keys[begin:stop, head] @ q[t, a] * scale
            scores = cap * torch.tanh(scores / cap) if cap else scores
            if sinks is not None:
                scores = torch.cat([scores, sinks[a].double()[None]])
            out[t, a] = torch.softmax(scores, 0)[: stop - begin] @ values[begin:stop, head]
    return out
