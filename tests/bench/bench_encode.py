"""How fast weights are encoded: `make bench-encode`.

MB/s of bf16 weights read, of each type, with all threads and with one, with importances, beside reading the same bytes from
memory (`kt_bench_read`) and the torch encoder where it has the type. The median of some repetitions; one size of matrix.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ktransformers import native
from ktransformers.quants.encode import quantize

ROWS, COLUMNS = 4096, 4096
IN_TORCH = ("F16", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def seconds(work: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(kind: str, repeat: int) -> dict[str, float | str | None]:
    x = (torch.randn(ROWS, COLUMNS) * 0.02).bfloat16()
    importance = torch.rand(COLUMNS)
    speed = lambda work, share=1.0: share * x.nbytes / seconds(work, repeat) / 1e6  # noqa: E731
    row: dict[str, float | str | None] = {"type": kind, "MB/s": speed(lambda: native.encode(x, kind))}
    row["importances"] = speed(lambda: native.encode(x, kind, importance))
    native.set_threads(1)
    row["one thread"] = speed(lambda: native.encode(x, kind))
    native.set_threads(None)
    part = x[: ROWS // 16]
    row["torch"] = speed(lambda: quantize(part.float(), kind), 1 / 16) if kind in IN_TORCH else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    data = torch.zeros(ROWS * COLUMNS * 2, dtype=torch.uint8).random_(0, 255)
    native.bench_read(data)
    read = data.nbytes / seconds(lambda: native.bench_read(data), options.repeat) / 1e6
    print(f"{native.isa()}, {native.threads()} threads; reading from memory: {read:.0f} MB/s")
    print("MB/s of bf16     all  importances  one thread  torch")
    rows = []
    for kind in native.encoded_types():
        rows.append(measure(kind, options.repeat))
        numbers = [rows[-1][key] for key in ("MB/s", "importances", "one thread", "torch")]
        print(f"{kind:12}" + "".join(f"{'':>9}" if n is None else f"{n:9.1f}" for n in numbers), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"isa": native.isa(), "read": read, "types": rows}, indent=1))


if __name__ == "__main__":
    main()
