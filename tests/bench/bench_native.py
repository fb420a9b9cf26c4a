"""Speed of the C library beside this machine's limits, measured in the same seconds: `make bench`.

One MoE layer of random weights for each format and shape, far larger than the last-level cache; T tokens a call,
a new routing each call. Each cell is taken in short slices, with a probe of the read bandwidth and of the multiplier's
peak before and after each, because shared machines change from second to second: quote shares, not absolute figures.
Shares are medians over slices. `of read`: bytes of the experts that a call touches, over time and the bandwidth of
reading the same bytes. `of peak`: operations over time and the peak of the unit that the format's prefill runs on.
`error`: mean|d| / mean|ref| against fp32 arithmetic on the dequantized weights (native.set_exact).
`--json FILE` keeps every figure; `python -m tests.bench.plot FILE` draws them.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ktransformers import native
from tests.native.blocks import FORMATS, random_weight
from tests.native.scaled_blocks import KINDS, random_scaled

SHAPES = {"S1": (2048, 768, 128, 8), "S2": (2048, 1408, 64, 6), "S3": (7168, 2048, 16, 8)}
"""Hidden, intermediate, experts, experts a token: Qwen3-30B-A3B, DeepSeek-V2-Lite, DeepSeek-V3 with fewer experts."""

TYPES = [*FORMATS, *KINDS]
DISTINCT = 2  # different matrices; each expert still has memory of its own
BF16_TYPES = ("BF16", "FP8", "FP8_PERCHANNEL", "MXFP8")
ERROR_TOKENS = 64  # of a call, at most, for the error
ERROR_CALL_TOKENS = 16  # in all calls together, at least


@dataclass
class Row:
    type: str
    shape: str
    hidden: int
    inner: int
    experts: int
    per_token: int
    isa: str
    threads: int
    tokens: int
    routing: str
    bytes: float  # of the experts a call touches
    ops: float
    us: float
    us_q1: float
    us_q3: float
    gbs: float
    read_gbs: float
    read_share: float
    gops: float
    peak: str
    peak_gops: float
    peak_share: float
    error: float


def weights(name: str, role: int, rows: int, cols: int) -> list[Any]:
    """DISTINCT matrices, others for each role."""
    rng = np.random.default_rng(role)
    make = random_scaled if name in KINDS else random_weight
    return [make(rng, name, rows, cols) for _ in range(DISTINCT)]


def copies(some: list[Any], count: int) -> list[Any]:
    """One matrix an expert, in memory of its own: as a GGUF has them, one after the other."""
    each = some[0].data.numel()
    data = torch.empty(count * each, dtype=torch.uint8)
    out = []
    for e, view in enumerate(data.split(each)):
        w = some[e % len(some)]
        view.copy_(w.data.reshape(-1))
        part = {"data": view.view(w.data.shape)}
        if getattr(w, "scales", None) is not None:
            part["scales"] = w.scales.clone()
        out.append(replace(w, **part))
    return out


class Layer:
    """One MoE layer."""

    def __init__(self, name: str, shape: str) -> None:
        self.hidden, self.inner, self.count, self.per_token = SHAPES[shape]
        block = FORMATS[name][0] if name in FORMATS else 32
        self.inner = math.ceil(self.inner / block) * block
        sizes = ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))
        parts = [copies(weights(name, role, *size), self.count) for role, size in enumerate(sizes)]
        self.expert_bytes = sum(p[0].nbytes if name in KINDS else p[0].data.numel() for p in parts)
        self.probe = torch.empty(256 << 20, dtype=torch.uint8).fill_(1)  # as large as what a call reads is spread out
        self.experts = native.Experts(*parts, name=name)
        self.dtype = torch.bfloat16 if name in BF16_TYPES else torch.float32


def routing(layer: Layer, tokens: int, kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """K distinct experts a token: uniform, or skewed as 1 / (rank + 3) over the experts."""
    weight = torch.ones(layer.count) if kind == "uniform" else 1.0 / (torch.arange(layer.count) + 3.0)
    ids = torch.multinomial(weight.expand(tokens, -1), layer.per_token, generator=generator)
    return ids, torch.rand(tokens, layer.per_token, generator=generator)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_speed(data: torch.Tensor) -> float:
    """GB/s."""
    return data.numel() / seconds(lambda: native.bench_read(data)) / 1e9


def peak_speed(kind: str) -> float:
    """GOP/s; about ten milliseconds."""
    done = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < 0.01:
        done += native.bench_peak(kind, 1_000_000)
    return done / (time.perf_counter() - start) / 1e9


def multiplier(name: str) -> str:
    """The unit that the format's prefill GEMM runs on, on the instruction set in use."""
    if name in BF16_TYPES:
        return "bf16" if native.bench_peak("bf16", 16) else "f32"
    return "f32" if name in ("F16", "F32", "GPTQ_ORDER") else "int8"


def error(layer: Layer, tokens: int, kind: str) -> float:
    """Over several calls together: one token's error alone says little."""
    generator = torch.Generator().manual_seed(tokens)
    calls = max(1, ERROR_CALL_TOKENS // tokens)
    tokens = min(tokens, ERROR_TOKENS)
    wrong = right = 0.0
    for _ in range(calls):
        hidden = torch.randn(tokens, layer.hidden, generator=generator).to(layer.dtype)
        call = (hidden.float(), *routing(layer, tokens, kind, generator))
        native.set_exact(True)
        truth = layer.experts(*call).double()
        native.set_exact(False)
        found = layer.experts(hidden, *call[1:]).double()
        wrong, right = wrong + (found - truth).abs().mean().item(), right + truth.abs().mean().item()
    return wrong / right


def measure(layer: Layer, name: str, shape: str, tokens: int, kind: str, slices: int, budget: float) -> Row:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, layer.hidden, generator=generator).to(layer.dtype)
    calls = [routing(layer, tokens, kind, generator) for _ in range(8)]
    bytes_ = statistics.mean(len(ids.unique()) for ids, _ in calls) * layer.expert_bytes
    ops = 2.0 * 3 * layer.hidden * layer.inner * layer.per_token * tokens
    unit = multiplier(name)
    limits = lambda: (read_speed(layer.probe), peak_speed(unit))  # noqa: E731
    layer.experts(hidden, *calls[0])
    took, reads, peaks, before = [], [], [], limits()
    for _ in range(slices):
        times, start = [], time.perf_counter()
        while time.perf_counter() - start < budget or len(times) < 2:
            call = calls[len(times) % 8]
            times.append(seconds(lambda: layer.experts(hidden, *call)))  # noqa: B023 (called at once)
        after = limits()
        took.append(statistics.median(times))
        reads.append((before[0] + after[0]) / 2)
        peaks.append((before[1] + after[1]) / 2)
        before = after
    q1, middle, q3 = statistics.quantiles(took, n=4, method="inclusive")
    share = lambda work, limit: statistics.median(work / t / 1e9 / m for t, m in zip(took, limit, strict=True))  # noqa: E731
    return Row(
        name, shape, layer.hidden, layer.inner, layer.count, layer.per_token, native.isa(), native.threads(), tokens,
        kind, bytes_, ops, middle * 1e6, q1 * 1e6, q3 * 1e6, bytes_ / middle / 1e9, statistics.median(reads),
        share(bytes_, reads), ops / middle / 1e9, unit, statistics.median(peaks), share(ops, peaks),
        error(layer, tokens, kind),
    )  # fmt: skip


def table(rows: list[Row]) -> Table:
    first = rows[0]
    title = (
        f"{first.shape}: H{first.hidden} I{first.inner} E{first.experts} top-{first.per_token}, {first.threads} threads"
    )
    out = Table(title=title, caption="µs: median (quartiles) over slices")
    for column in ("type", "isa", "routing"):
        out.add_column(column)
    for column in ("T", "µs", "GB/s", "of read", "GOP/s", "of peak", "error"):
        out.add_column(column, justify="right", no_wrap=True)
    for at, r in enumerate(rows):
        out.add_row(
            r.type, r.isa, r.routing, str(r.tokens), f"{r.us:.0f} ({r.us_q1:.0f}-{r.us_q3:.0f})", f"{r.gbs:.1f}",
            f"{r.read_share:.0%}", f"{r.gops:.0f}", f"{r.peak_share:.0%} {r.peak}", f"{r.error:.3g}",
            end_section=at + 1 < len(rows) and rows[at + 1].type != r.type,
        )  # fmt: skip
    return out


def cells(options: argparse.Namespace) -> Iterable[tuple[str, str, str, int, str]]:
    for shape in options.shapes:
        for name in options.types:
            for isa in options.isa or [native.isa()]:
                for kind in options.routing:
                    for tokens in options.tokens:
                        yield shape, name, isa, tokens, kind


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda known: lambda text: [checked(part, known) for part in text.split(",") if part]  # noqa: E731

    def checked(part: str, known: Iterable[str]) -> str:
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r}, expected some of {','.join(known)}")
        return part

    parser.add_argument("--quick", action="store_true", help="three short slices instead of nine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after each cell")
    parser.add_argument("--types", type=words(TYPES), default=TYPES, help="comma-separated (default: all)")
    parser.add_argument("--shapes", type=words(SHAPES), default=["S2"], help="of S1,S2,S3 (default: S2)")
    parser.add_argument("--routing", type=words(("uniform", "skewed")), default=["uniform"], help="uniform,skewed")
    parser.add_argument("--tokens", type=lambda t: [int(n) for n in t.split(",")], default=[1, 4, 32, 128, 512])
    parser.add_argument("--isa", type=words(native.isas()), help="instruction sets (default: the best one)")
    parser.add_argument("--threads", type=int, help="threads of the pool")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        native.set_threads(options.threads)
    rows: list[Row] = []
    todo, console = list(cells(options)), Console()
    slices, budget = (3, 0.06) if options.quick else (9, 0.2)
    layer, made = None, None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(todo))
        for shape, name, isa, tokens, kind in todo:
            progress.update(task, description=f"{shape} {name} {isa} T={tokens} {kind}")
            if made != (name, shape):
                layer = None  # give the memory back before taking more
                layer, made = Layer(name, shape), (name, shape)
            native.set_isa(isa)
            rows.append(measure(layer, name, shape, tokens, kind, slices, budget))
            if options.json:
                options.json.write_text(json.dumps({"rows": [asdict(r) for r in rows]}, indent=1) + "\n")
            progress.advance(task)
    wide = Console() if console.is_terminal else Console(width=130)
    for shape in options.shapes:
        wide.print(table([r for r in rows if r.shape == shape]))


if __name__ == "__main__":
    main()
