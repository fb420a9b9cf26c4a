"""Speed of the C library beside this machine's limits, measured in the same seconds: `make bench`.

Decode (one token) is held to the read bandwidth of the very bytes it reads; prefill to the multiplier peak of
the instruction set in use (int8, bf16 or fp32, whichever the format's GEMM multiplies with). Activations are fp32,
for BF16 weights bf16: only those meet the bf16 multiplier. Each figure is the median over short slices, with a probe
of the limit right before and right after each slice, because shared machines change from second to second: quote
shares, not absolute figures. `--quick` uses fewer experts and slices.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ktransformers import native
from tests.native.blocks import FORMATS, Packed, Type, random_weight

HIDDEN, INNER, PER_TOKEN = 2048, 1536, 6  # DeepSeek-V2-Lite's layer with I a multiple of 256
DISTINCT = 2  # different matrices; each expert still has memory of its own


@dataclass
class Row:
    type: str
    isa: str
    tokens: int
    limit: str  # "read" or the multiplier
    speed: float  # GB/s of weight bytes, or GOP/s
    limit_speed: float
    share: float  # median of per-slice shares
    milliseconds: float


class Layer:
    """One MoE layer of random weights; `data` holds all bytes of it in one buffer."""

    def __init__(self, name: str, count: int) -> None:
        rng = np.random.default_rng(0)
        sizes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        some = [[random_weight(rng, name, *size).data for size in sizes] for _ in range(DISTINCT)]
        each = [d.numel() for d in some[0]]
        self.data = torch.empty(count * sum(each), dtype=torch.uint8)
        parts: tuple[list[Packed], ...] = ([], [], [])
        at = 0
        for role in range(3):  # as in a GGUF: all gates, all ups, all downs
            for e in range(count):
                view = self.data[at : at + each[role]]
                view.copy_(some[e % DISTINCT][role])
                parts[role].append(Packed(view, Type(name), sizes[role]))
                at += each[role]
        self.count, self.expert_bytes = count, sum(each)
        self.experts = native.Experts(*parts)


def routing(count: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """K distinct experts a token, uniform."""
    ids = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :PER_TOKEN].contiguous()
    return ids, torch.rand(tokens, PER_TOKEN, generator=generator)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_speed(data: torch.Tensor) -> float:
    """GB/s over up to 256 MB of `data`."""
    part = data[: 256 << 20]
    return part.numel() / seconds(lambda: native.bench_read(part)) / 1e9


def peak_speed(kind: str) -> float:
    """GOP/s; about ten milliseconds."""
    done = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < 0.01:
        done += native.bench_peak(kind, 1_000_000)
    return done / (time.perf_counter() - start) / 1e9


def multiplier(name: str) -> str:
    """The unit that the format's prefill GEMM runs on."""
    if FORMATS[name][0] > 1:
        return "int8"
    return "bf16" if name == "BF16" and native.isa() == "avx512_bf16" else "f32"


def measure(layer: Layer, name: str, tokens: int, slices: int, budget: float) -> Row:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    hidden = hidden.bfloat16() if name == "BF16" else hidden
    kind = "read" if tokens == 1 else multiplier(name)
    limit = (lambda: read_speed(layer.data)) if tokens == 1 else (lambda: peak_speed(kind))
    work = PER_TOKEN * layer.expert_bytes if tokens == 1 else 2 * 3 * HIDDEN * INNER * PER_TOKEN * tokens
    calls = [routing(layer.count, tokens, generator) for _ in range(8)]
    layer.experts(hidden, *calls[0])
    speeds, limits, before = [], [], limit()
    for _ in range(slices):
        times, start = [], time.perf_counter()
        while time.perf_counter() - start < budget:
            ids, weights = calls[len(times) % 8]
            times.append(seconds(lambda: layer.experts(hidden, ids, weights)))  # noqa: B023 (called at once)
        after = limit()
        speeds.append(work / statistics.median(times) / 1e9)
        limits.append((before + after) / 2)
        before = after
    speed = statistics.median(speeds)
    share = statistics.median(s / m if m else 0.0 for s, m in zip(speeds, limits, strict=True))
    return Row(name, native.isa(), tokens, kind, speed, statistics.median(limits), share, work / speed / 1e6)


def table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"One MoE layer: H{HIDDEN} I{INNER}, {PER_TOKEN} experts a token, {native.threads()} threads"
    out = Table(title=title, caption="share: median over slices of speed / limit measured around the slice")
    for column in ("type", "isa", "T", "speed", "limit", "share", "ms"):
        out.add_column(column, justify="left" if column in ("type", "isa") else "right")
    for r in rows:
        unit = "GB/s" if r.limit == "read" else "GOP/s"
        out.add_row(
            r.type, r.isa, str(r.tokens), f"{r.speed:.1f} {unit}", f"{r.limit} {r.limit_speed:.1f}", f"{r.share:.0%}",
            f"{r.milliseconds:.2f}", end_section=r.tokens == max(x.tokens for x in rows),
        )  # fmt: skip
    Console().print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 experts and 3 slices instead of 64 and 9")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--types", default=",".join(FORMATS), help="comma-separated weight types")
    parser.add_argument("--tokens", default="1,4,32,512", help="comma-separated token counts")
    parser.add_argument("--isa", help="comma-separated instruction sets (default: the best one)")
    parser.add_argument("--threads", type=int, help="threads of the pool")
    options = parser.parse_args()
    if options.threads:
        native.set_threads(options.threads)
    rows = []
    for name in options.types.split(","):
        layer = Layer(name, 16 if options.quick else 64)
        for isa in (options.isa or native.isa()).split(","):
            native.set_isa(isa)
            for tokens in map(int, options.tokens.split(",")):
                row = measure(layer, name, tokens, 3 if options.quick else 9, 0.1 if options.quick else 0.25)
                rows.append(row)
                if options.json:
                    print(json.dumps(asdict(row)), flush=True)
    if not options.json:
        table(rows)


if __name__ == "__main__":
    main()
