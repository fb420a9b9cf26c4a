"""The GPU kernels beside torch's bf16 and what the GPU reaches at most: `make bench-gpu`.

Linears of packed weights, routed experts, and decode attention over pages. Each call is captured many times in one graph,
over so many weights or caches that none is found in the L2 cache; a figure is the best of several replays, by the
device's own clock. The bound of a call is the longer of its bytes over the bandwidth and its operations over the bf16
peak, both measured here with torch. Without a GPU it says so and measures nothing.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ktransformers.kernels import compiler, context, gqa_decode, layouts, linear, mla_decode, words
from ktransformers.kernels import experts as e
from ktransformers.native import Glu
from ktransformers.native.pages import PAGE

TYPES = {
    **{name: layouts.layout_of(name) for name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4")},
    "GPTQ4 g128": layouts.scaled_layout("GPTQ4", 4096, 128),
    "INT8 g128": layouts.quantized_layout(torch.bfloat16, 4096, 8, 128),
}
SHAPES = {"4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "2048x7168": (2048, 7168)}
ROWS = (1, 2, 4, 8, 16, 64, 512, 4096)
EXPERTS = {"Qwen3-30B-A3B": (128, 2048, 768, 8), "DeepSeek-V3": (256, 7168, 2048, 8)}  # experts, hidden, width, chosen
TOKENS = (1, 4, 16, 64, 512)
MLA = {"16 heads": 16, "128 heads": 128}
GQA = {"32 heads on 4": (32, 4), "64 heads on 8": (64, 8)}
LENGTHS = (1024, 8192, 65536)
QUICK = {"types": ["Q4_K"], "shapes": ["4096x4096"], "rows": [1, 16], "tokens": [1], "lengths": [8192]}

DTYPE = torch.bfloat16


@dataclass
class Case:
    """One call. `make(i)` gives it over a weight of its own; `other` likewise the same by torch in bf16, or None."""

    kernel: str
    what: str
    shape: str
    size: int
    nbytes: int
    ops: float
    make: Callable[[int], Callable[[], object]]
    other: Callable[[int], Callable[[], object]] | None = None
    other_bytes: int = 0


@dataclass
class Result:
    kernel: str
    what: str
    shape: str
    size: int
    us: float
    gb_per_s: float
    of_bound: float
    times_bf16: float | None


# --- cases ------------------------------------------------------------------------------------------------------------


def random_words(layout: layouts.Layout, shape: tuple[int, ...], device: torch.device) -> words.Words:
    """Codes of any value, scales of 2^-7: made on the GPU, as a layer of experts takes minutes to quantize."""
    made = words.empty(layout, shape, device)
    for plane in made.planes:
        plane.random_(-(1 << 31), (1 << 31) - 1)
    for name, part in made.parts.items():
        if name == "scales":
            part.fill_(120 if layout.scale == "E8M0" else 1 if layout.super_blocks else 2**-7)
        elif name in ("d", "dmin"):
            part.fill_(2**-7)
    return made


def linears(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for name in args.types:
        for shape in args.shapes:
            n, k = SHAPES[shape]
            nbytes = TYPES[name].nbytes((n, k))
            for rows in args.rows:
                x = torch.randn(rows, k, device=device).to(DTYPE)

                def ours(i: int, name: str = name, n: int = n, k: int = k, x: Tensor = x) -> Callable[[], object]:
                    made, out = random_words(TYPES[name], (n, k), device), x.new_empty(len(x), n)
                    size = linear.workspace_size(made, len(x), DTYPE)
                    return partial(linear.linear, x, made, None, out, torch.empty(size, device=device))

                def torchs(i: int, n: int = n, k: int = k, x: Tensor = x) -> Callable[[], object]:
                    return partial(F.linear, x, torch.randn(n, k, device=device).to(DTYPE))

                yield Case("linear", name, shape, rows, nbytes, 2.0 * rows * n * k, ours, torchs, 2 * n * k)


def experts(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for model, (count, hidden, width, chosen) in EXPERTS.items():
        for name in args.types:
            layout = TYPES[name]
            each = layout.nbytes((2 * width, hidden)) + layout.nbytes((hidden, width))
            for tokens in args.tokens:
                touched = count * (1 - (1 - chosen / count) ** tokens)
                ops = 6.0 * tokens * chosen * width * hidden

                def ours(
                    i: int, layout: layouts.Layout = layout, sizes: tuple = (count, hidden, width, chosen), tokens: int = tokens
                ) -> Callable[[], object]:
                    count, hidden, width, chosen = sizes
                    first = random_words(layout, (count, 2 * width, hidden), device)
                    made = e.Experts((first,), random_words(layout, (count, hidden, width), device), Glu())
                    x = torch.randn(tokens, hidden, device=device).to(DTYPE)
                    ids = torch.rand(tokens, count, device=device).argsort(1)[:, :chosen].contiguous()
                    workspace = torch.empty(e.workspace_size(made, tokens, chosen, DTYPE), device=device)
                    weights = torch.rand(tokens, chosen, device=device)
                    return partial(e.forward, made, x, ids, weights, torch.empty_like(x), workspace)

                yield Case("experts", name, model, tokens, round(touched * each), ops, ours)


def paged(length: int, device: torch.device) -> context.Context:
    table = torch.randperm(length // PAGE, device=device, dtype=torch.int32)[None]
    return context.Context(table, torch.tensor([length], dtype=torch.int32, device=device))


def attention(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for length in args.lengths:
        seen = paged(length, device)
        for name, heads in MLA.items():

            def latents(i: int, heads: int = heads, seen: context.Context = seen) -> Callable[[], object]:
                cache = torch.randn(seen.table.numel(), PAGE, 576, device=device).to(DTYPE)
                q = torch.randn(1, heads, 576, device=device).to(DTYPE)
                size = mla_decode.workspace_size(q, cache, seen, 512)
                return partial(mla_decode.mla_decode, q, cache, seen, 512, 0.1, out=q.new_empty(1, heads, 512),
                               workspace=torch.empty(size, device=device))  # fmt: skip

            yield Case("MLA decode", name, "512+64", length, length * 1152, 2.0 * heads * length * 1088, latents)
        for name, (heads, kv) in GQA.items():

            def grouped(i: int, sizes: tuple = (heads, kv), seen: context.Context = seen) -> Callable[[], object]:
                heads, kv = sizes
                keys, values = (torch.randn(seen.table.numel(), PAGE, kv, 128, device=device).to(DTYPE) for _ in range(2))
                q, scores = torch.randn(1, heads, 128, device=device).to(DTYPE), gqa_decode.Scores(0.1)
                size = gqa_decode.workspace_size(q, keys, values, seen, scores)
                return partial(gqa_decode.gqa_decode, q, keys, values, seen, scores, out=torch.empty_like(q),
                               workspace=torch.empty(size, device=device))  # fmt: skip

            yield Case("GQA decode", name, "128", length, length * kv * 512, 4.0 * heads * length * 128, grouped)


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(calls: list[Callable[[], object]], repeat: int = 20) -> float:
    """Of one of `calls`, which one graph does in turn, over and over for 32 of them at least."""
    again = max(1, 32 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * again:
            call()
    took = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return min(took) / (len(calls) * again)


def over_many(make: Callable[[int], Callable[[], object]], nbytes: int, cold: int) -> list[Callable[[], object]]:
    """As many of a call as read `cold` bytes before one is read again."""
    return [make(i) for i in range(min(64, 1 + math.ceil(cold / max(1, nbytes))))]


def limits(device: torch.device) -> tuple[float, float]:
    """Bytes a second that a copy moves, both ways counted, and operations a second of a large bf16 product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b, m = torch.empty_like(a), torch.randn(8192, 8192, device=device).to(DTYPE)
    out = torch.empty_like(m)
    return 2 * a.numel() / seconds([lambda: b.copy_(a)]), 2 * 8192**3 / seconds([lambda: torch.mm(m, m, out=out)])


def measure(case: Case, bandwidth: float, peak: float, cold: int) -> Result:
    took = seconds(over_many(case.make, case.nbytes, cold))
    other = seconds(over_many(case.other, case.other_bytes, cold)) if case.other else None
    bound = max(case.nbytes / bandwidth, case.ops / peak)
    return Result(case.kernel, case.what, case.shape, case.size, took * 1e6, case.nbytes / took / 1e9, bound / took,
                  other and other / took)  # fmt: skip


def table_of(results: list[Result]) -> Table:
    table = Table()
    for column in ("kernel", "weights or heads", "shape", "rows or tokens", "µs", "GB/s", "of its bound", "times bf16"):
        table.add_column(column, justify="left" if column in ("kernel", "weights or heads", "shape") else "right")
    for r in results:
        times = "" if r.times_bf16 is None else f"{r.times_bf16:.2f}"
        row = r.kernel, r.what, r.shape, r.size, f"{r.us:.1f}", f"{r.gb_per_s:.0f}", f"{r.of_bound:.0%}", times
        table.add_row(*map(str, row))
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, known, kind in (("types", TYPES, str), ("shapes", SHAPES, str), ("rows", ROWS, int),
                              ("tokens", TOKENS, int), ("lengths", LENGTHS, int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=lambda text, kind=kind: [kind(part) for part in text.split(",")], default=list(known))
    parser.add_argument("--quick", action="store_true", help="one case of each kind")
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args()
    vars(args).update(QUICK if args.quick else {})
    return args


def main() -> None:
    args = parsed()
    if compiler.triton is None or not torch.cuda.is_available():
        reason = f"no Triton ({compiler.missing})" if compiler.triton is None else "no GPU that torch can use"
        print(f"Found {reason}: nothing was measured. What kernels are compiled to is in tests/bench/KERNELS.md.")
        return
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    bandwidth, peak = limits(device)
    name = f"{properties.name}: a copy moves {bandwidth / 1e9:.0f} GB/s, a bf16 product makes {peak / 1e12:.0f} TFLOP/s"
    console, results = Console(), []
    console.print(name)
    for cases in (linears, experts, attention):
        for case in cases(args, device):
            try:
                results.append(measure(case, bandwidth, peak, 4 * getattr(properties, "L2_cache_size", 64 << 20)))
            except torch.OutOfMemoryError:
                console.print(f"{case.kernel}, {case.what}, {case.shape}, {case.size}: does not fit")
            torch.cuda.empty_cache()
    console.print(table_of(results))
    if args.json:
        found = {"gpu": properties.name, "bandwidth": bandwidth, "bf16_peak": peak, "results": [asdict(r) for r in results]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
