"""Where unpacking into tiles begins to beat decoding: `python -m tests.bench.bench_thresholds`.

For each instruction set that this machine runs and each format, a matrix meets 1 to 16 tokens on the decode path and on
the tile path, both forced, in turns, on one thread. A cell is CPU time: other programs on the machine hardly count. The
weights of many calls in a row are different memory, more of it than the second-level cache holds.

`from`: the number of tokens from which tiles are to be taken, which costs least over all of 1 to 16 (`-`: there is no
decode kernel, or tiles never win). `lost`: what the threshold in use costs against it, on average over those tokens.
native/src/matmul/thresholds.c holds what was measured, by instruction set, with the machine and the day.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ktransformers import native
from tests.bench.bench_native import BF16_TYPES, TYPES, weights
from tests.native.scaled_blocks import KINDS

ROWS, COLS = 1024, 2048
TOKENS = range(1, 17)
BYTES = 24 << 20
"""Of all matrices of a format together: beyond the second-level cache of any core so far."""
NEVER = max(TOKENS) + 1
ALWAYS_DECODE, ALWAYS_TILES = 1 << 20, 1
STANDS_FOR = {
    "FP8": "F8_E4M3", "MXFP4_BESIDE": "F4_E2M1", "RAWINT4": "I4", "INT8_ROW": "I8", "U8_GROUP": "U8",
    "GPTQ_INT4": "GPTQ4", "GPTQ_INT8": "GPTQ8", "AWQ": "AWQ4",
}  # fmt: skip
"""Published format -> the library's format that it is measured for; GGUF's stand for themselves."""


def matrices(name: str) -> list[native.Linear]:
    """Handles of equal matrices in memory of their own, BYTES in all."""
    first = weights(name, 0, ROWS, COLS)[0]
    if name == "FP8":  # normal values, of which few are subnormal as codes: some processors multiply such floats slowly
        values = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 110
        first = replace(first, data=values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    size = first.nbytes if name in KINDS else first.data.numel()

    def clone() -> Any:
        parts = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(first).items()}
        return type(first)(**parts)

    return [native.Linear(clone()) for _ in range(max(2, BYTES // size))]


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def measure(linears: list[native.Linear], dtype: torch.dtype, rounds: int, each: int) -> dict[int, tuple[float, float, float]]:
    """Tokens -> microseconds of a call by decode, by tiles and as the library chooses: medians over rounds, in each of
    which every cell is measured once, over `each` matrices."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(max(TOKENS), COLS, generator=generator).to(dtype)
    paths = (ALWAYS_DECODE, ALWAYS_TILES, 0)
    took: dict[tuple[int, int], list[float]] = {(t, p): [] for t in TOKENS for p in paths}
    at = 0
    for _ in range(rounds):
        for tokens, path in took:
            native.set_panel_threshold(path)
            some = [linears[(at + i) % len(linears)] for i in range(each)]
            at += each
            took[tokens, path].append(cpu_seconds(lambda: [linear(x[:tokens]) for linear in some]))  # noqa: B023
    native.set_panel_threshold(0)
    return {t: tuple(statistics.median(took[t, p]) / each * 1e6 for p in paths) for t in TOKENS}


def cost(cells: dict[int, tuple[float, float, float]], threshold: int) -> float:
    """How many times as long as the better path, on (geometric) average over all numbers of tokens."""
    logs = [math.log((d if t < threshold else u) / min(d, u)) for t, (d, u, _) in cells.items()]
    return math.exp(statistics.mean(logs))


def best(cells: dict[int, tuple[float, float, float]]) -> int:
    """0 where both paths are the same code."""
    if all(abs(d / u - 1) < 0.05 for d, u, _ in cells.values()):
        return 0
    return min(range(1, NEVER + 1), key=lambda threshold: cost(cells, threshold))


def chosen_cost(cells: dict[int, tuple[float, float, float]]) -> float:
    return math.exp(statistics.mean(math.log(max(1.0, c / min(d, u))) for d, u, c in cells.values()))


def table(isa: str, found: dict[str, dict[int, tuple[float, float, float]]]) -> Table:
    out = Table(title=f"{isa}: µs of [{ROWS}, {COLS}] by decode / by tiles")
    out.add_column("format")
    for tokens in TOKENS:
        out.add_column(str(tokens), justify="right", no_wrap=True)
    out.add_column("from", justify="right")
    out.add_column("lost", justify="right")
    for name, cells in found.items():
        threshold = best(cells)
        shown = [f"{d:.0f}/{u:.0f}" for d, u, _ in cells.values()]
        lost = "-" if not threshold else f"{chosen_cost(cells) / cost(cells, threshold) - 1:.0%}"
        out.add_row(name, *shown, str(threshold) if 0 < threshold < NEVER else "-", lost)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--types", type=words, default=[n for n in TYPES if n in STANDS_FOR or n not in KINDS])
    parser.add_argument("--isa", type=words, default=[n for n in native.isas() if n not in ("portable", "amx_emulated")])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", type=int, default=4, help="calls of a cell and round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    native.set_threads(1)
    found: dict[str, dict[str, Any]] = {isa: {} for isa in options.isa}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(options.types) * len(options.isa))
        for name in options.types:
            linears = matrices(name)
            for isa in options.isa:
                native.set_isa(isa)
                dtype = torch.bfloat16 if name in BF16_TYPES else torch.float32
                found[isa][name] = measure(linears, dtype, options.rounds, options.each)
                if options.json:
                    options.json.write_text(json.dumps(found) + "\n")
                progress.advance(task)
    for isa, cells in found.items():
        Console(width=240).print(table(isa, cells))
        print(f"/* {isa} */", ", ".join(f"{STANDS_FOR.get(n, n)} {best(c)}" for n, c in cells.items()))


if __name__ == "__main__":
    main()
