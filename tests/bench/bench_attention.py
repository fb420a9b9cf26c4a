"""Attention over a cache, ours beside torch's fused kernel: `python -m tests.bench.bench_attention`.

Decode: one query over 512, 4096 and 32768 cached tokens. Prefill: 512 queries after 0 and 4096 cached tokens. Both in
bf16, on one pool; torch gets the query heads of a group packed as queries of one head, as operators/cpu_attention.py
does it, and as many threads. Both find their arguments ready, ours as a step hands them on in C, torch's in bf16. The two
take turns; a figure is the median over rounds. Before each turn the other's threads have gone to sleep and its own are
awake: torch's go on looking for work for milliseconds, on the cores that ours need. GB/s: bytes of keys and values read
once over the time, beside the read bandwidth that kt_bench_read finds in the same rounds. `--rows` measures from how many
rows panels win, for native/src/matmul/thresholds.c, on one thread, in CPU time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ktransformers import native
from ktransformers.native.attention import prepare
from ktransformers.operators.cpu_attention import fused

SHAPES = {  # heads, heads of keys, size, value size
    "32 heads on 4": (32, 4, 128, 128),
    "16 heads on 16": (16, 16, 128, 128),
    "MLA 128 heads": (128, 1, 576, 512),
    "MLA 16 heads": (16, 1, 576, 512),
}
DECODE = [(1, 512), (1, 4096), (1, 32768)]
PREFILL = [(512, 512), (512, 4608)]
LAYERS_TOKENS = 32768  # one query goes through as many layers' caches as make so many tokens: code is warm, caches are not
ROWS, PANELS = 1 << 20, 1
ASLEEP = 0.03  # seconds after which neither's threads look for work


def make(shape: tuple[int, ...], queries: int, length: int) -> tuple[torch.Tensor, ...]:
    heads, kv_heads, size, width = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, queries, size, generator=generator)
    keys = torch.randn(1, kv_heads, length, size, generator=generator).bfloat16()
    shared = kv_heads == 1 and size > width
    return q, keys, keys if shared else torch.randn(1, kv_heads, length, width, generator=generator).bfloat16()


def torch_attends(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, width: int) -> Callable[[], torch.Tensor]:
    """Packed groups for one query; heads repeated, as transformers does it, for many."""
    q = q.bfloat16()
    group, scale = q.shape[1] // keys.shape[1], q.shape[3] ** -0.5
    if q.shape[2] == 1:
        rows = q.reshape(1, keys.shape[1], group, q.shape[3])
        return lambda: fused(rows, keys, values, None, scale)[..., :width]
    causal = q.shape[2] == keys.shape[2]
    seen = None if causal else torch.ones(q.shape[2], keys.shape[2]).tril(keys.shape[2] - q.shape[2]).bool()[None, None]

    def attends() -> torch.Tensor:
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (keys, values))
        return fused(q, k, v, seen, scale, causal)[..., :width]

    return attends


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def compare(name: str, queries: int, length: int, rounds: int, with_torch: bool) -> dict:
    shape = SHAPES[name]
    layers = max(1, LAYERS_TOKENS // length) if queries == 1 else 1
    each = [make(shape, queries, length) for _ in range(layers)]
    _, keys, values = each[0]
    shared = values is keys
    probe, wake = torch.zeros(256 << 20, dtype=torch.uint8), torch.zeros(1 << 16)
    took: dict[str, list[float]] = {"ours": [], "torch": [], "read": []}
    calls = {"ours": [prepare(*layer, value_size=shape[3]) for layer in each]}
    if with_torch:
        calls["torch"] = [torch_attends(*layer, shape[3]) for layer in each]
    for _ in range(rounds):
        for who, layers_of in calls.items():
            time.sleep(ASLEEP)
            took["read"].append(seconds(lambda: native.bench_read(probe)))  # the cache is cold, as behind a layer's weights
            if who == "torch":
                time.sleep(ASLEEP)
                wake.add_(1.0)
            took[who].append(seconds(lambda: [call() for call in layers_of]))  # noqa: B023
    middle = {who: statistics.median(times) / (1 if who == "read" else layers) for who, times in took.items() if times}
    bytes_read = keys.nbytes + (0 if shared else values.nbytes)
    heads, _, size, width = shape
    seen = queries * (length - queries) + queries * (queries + 1) / 2
    return {
        "shape": name, "queries": queries, "length": length, "ours_us": middle["ours"] * 1e6,
        "torch_us": middle["torch"] * 1e6 if with_torch else None, "gb_s": bytes_read / middle["ours"] / 1e9,
        "read_gb_s": probe.nbytes / middle["read"] / 1e9,
        "gflops": 2 * heads * (size + width) * seen / middle["ours"] / 1e9,
    }  # fmt: skip


def rows_table(isa: str, rounds: int) -> dict[tuple[str, int], tuple[float, float]]:
    """(dtype, rows) -> CPU microseconds by kernels and by panels, 2048 tokens, one head of keys."""
    native.set_isa(isa)
    native.set_threads(1)
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        keys, values = (torch.randn(1, 1, 2048, 128).to(dtype) for _ in range(2))
        for rows in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128):
            call = prepare(torch.randn(1, rows, 1, 128), keys, values)
            times: dict[int, list[float]] = {ROWS: [], PANELS: []}
            for _ in range(rounds):
                for path, took in times.items():
                    native.set_panel_threshold(path)
                    call()
                    took.append(seconds(lambda: [call() for _ in range(8)], time.thread_time))  # noqa: B023
            found[str(dtype).removeprefix("torch."), rows] = tuple(statistics.median(t) / 8e-6 for t in times.values())
    native.set_panel_threshold(0)
    native.set_threads(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 32768 tokens")
    parser.add_argument("--rows", action="store_true", help="instead: where panels begin to win")
    parser.add_argument("--isa", help="instruction sets, separated by commas", default=native.isa())
    parser.add_argument("--threads", type=int, help="of the pool and of torch")
    parser.add_argument("--no-torch", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    console, rounds, found = Console(width=100), 5 if args.quick else 15, []
    if args.threads:
        native.set_threads(args.threads)
    torch.set_num_threads(native.threads())
    for isa in args.isa.split(","):
        if args.rows:
            for (dtype, rows), (kernels, panels) in rows_table(isa, rounds).items():
                console.print(f"{isa} {dtype} {rows:4} rows: kernels {kernels:8.0f} us, panels {panels:8.0f} us")
            continue
        native.set_isa(isa)
        table = Table(*("shape", "queries", "cached", "us", "GB/s", "read GB/s", "GFLOP/s", "torch us", "ratio"),
                      title=f"bf16 cache, {isa}, {native.threads()} threads")  # fmt: skip
        for queries, length in DECODE + PREFILL:
            for name in SHAPES:
                if (args.quick and length > 8192) or (queries > 1 and name.startswith("MLA 128")):
                    continue
                row = compare(name, queries, length, rounds if queries == 1 else 5, not args.no_torch)
                found.append({"isa": isa, **row})
                ours, theirs = row["ours_us"], row["torch_us"]
                beside = (f"{theirs:.0f}", f"{theirs / ours:.2f}") if theirs else ("-", "-")
                table.add_row(name, str(queries), str(length), f"{ours:.0f}", f"{row['gb_s']:.1f}",
                              f"{row['read_gb_s']:.1f}", f"{row['gflops']:.0f}", *beside)  # fmt: skip
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
