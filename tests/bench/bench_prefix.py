"""The prefix cache beside no model: a prompt's blocks put in, found in memory, found on disk. `python -m tests.bench.bench_prefix`.

The cache is one of Qwen3-30B-A3B's shape, 48 layers of 4 heads of 128 in bf16, filled with random numbers. Shown are the
medians of several turns. `--dir`: on which disk; files are read from the page cache, and once after it was told to forget them.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from ktransformers.engine import blocks
from ktransformers.engine.block_files import block_files
from ktransformers.engine.disk_blocks import DiskBlocks
from ktransformers.engine.prefix_tree import PrefixTree
from ktransformers.operators.paged_cache import PagedCache, PagedLayer

LAYERS, SIZES, KEY, ROOM = 48, (4, 128, 128), b"bench", 1 << 40


def empty(model=None):
    return PagedCache([PagedLayer("bf16") for _ in range(LAYERS)])


def tree_over(disk):
    with mock.patch.object(blocks, "paged_cache", empty), mock.patch.object(blocks, "kept_sizes", lambda model: dict.fromkeys(range(LAYERS), SIZES)):
        return PrefixTree(None, KEY, ROOM, disk)


def seconds(call, turns=1):
    """The median of several calls, and what the last one gave."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        found = call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), found


def forgotten(folder):
    """Have the system forget what it holds of the files."""
    for file in block_files(folder):
        with open(file.path, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_disk(folder, ids, turns):
    """Seconds until a fresh process would have the prefix: opening the folder and one lookup."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        disk = DiskBlocks(folder, ROOM, KEY)
        cache, length = tree_over(disk).lookup(ids)
        taken.append(time.perf_counter() - start)
        assert length == len(ids) - 1 and disk.counts.refused == 0
        disk.close()
        del cache
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids, cache = torch.randint(0, 150_000, (args.tokens + 1,)).tolist(), empty()
    for layer in cache.layers:
        layer.update(*(torch.randn(1, 4, args.tokens, 128).bfloat16() for _ in range(2)))
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = Path(folder)
        disk = DiskBlocks(folder, ROOM, KEY, pending=ROOM)
        tree = tree_over(disk)
        first, count = seconds(lambda: tree.insert(ids, cache))
        written, _ = seconds(lambda: disk.flush())
        again, _ = seconds(lambda: tree.insert(ids, cache), args.turns)
        memory, _ = seconds(lambda: tree.lookup(ids), args.turns)
        disk.close()
        size, warm = tree.nbytes / 1e6, from_disk(folder, ids, args.turns)
        forgotten(folder)
        cold = from_disk(folder, ids, 1)
    print(f"{count} blocks of 64 tokens, {size:.0f} MB")
    print(f"insert, all new: {first * 1e3:.1f} ms; all known: {again * 1e3:.2f} ms; written behind: {size / (first + written):.0f} MB/s")
    print(f"lookup in memory: {memory * 1e3:.2f} ms")
    for name, taken in (("in the page cache", warm), ("forgotten by it", cold)):
        print(f"lookup on disk, files {name}: {taken * 1e3:.0f} ms, {size / taken:.0f} MB/s")


if __name__ == "__main__":
    main()
