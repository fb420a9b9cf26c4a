"""What the GPU kernels are compiled to, for GPUs that need not be there: `python -m tests.bench.bench_kernels`.

Registers, shared memory, spills, and instructions of the main loop for each weight, by kernel, type of weights and chip;
writes KERNELS.md beside this file. Needs Triton, whose wheel brings the compilers and disassemblers; no GPU.
tests/kernels/test_compiled.py compiles the same and holds new code to the table.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from ktransformers.kernels import combining, dot, gating, gemv, grouping, layouts
from ktransformers.kernels import dequantize as dense
from ktransformers.kernels import words as w
from ktransformers.kernels.experts import Experts
from ktransformers.native.experts import Glu
from tests.kernels.compiling import AMD, TARGETS, compile_kernel, meta

TABLE = Path(__file__).with_name("KERNELS.md")

N, K, E, TOKENS, PER_TOKEN = 2048, 4096, 128, 64, 8

TYPES = {
    **{name: layouts.layout_of(name) for name in layouts.GGUF_TYPES},
    "GPTQ4 g128": layouts.scaled_layout("GPTQ4", K, 128),
    "AWQ4 g128": layouts.scaled_layout("AWQ4", K, 128, zeros=True),
    "I8 by row": layouts.scaled_layout("I8", K, K, "F32"),
    "FP8 128x128": layouts.scaled_layout("F8_E4M3", K, 128, "F32"),
}

CHIPS = {"H200": ("sm_90", 132, 1.83, 4800), "A100 80G": ("sm_80", 108, 1.41, 2039),
         "RTX 4090": ("sm_89", 128, 2.52, 1008), "RTX 5090": ("sm_120", 170, 2.41, 1792)}  # fmt: skip
"""Published: target, multiprocessors, GHz, GB/s. A multiprocessor issues 128 lanes of instructions a cycle."""


@dataclass(frozen=True)
class Case:
    """One kernel of one type of weights: `weights` are those of a program's loop, 0 where that has no loop over weights."""

    kernel: str
    type: str
    rows: str
    function: Any
    arguments: Callable[[], dict[str, Any]]
    weights: int = 0
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.kernel} | {self.type} | {self.rows}"


@dataclass(frozen=True)
class Row:
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    per_weight: float
    wide: bool
    matrix: str


def _sums(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def _words(layout: layouts.Layout, *experts: int) -> w.Words:
    return w.empty(layout, (*experts, N, K), "meta")


def _gemv_cases() -> Iterator[Case]:
    def case(name: str, rows: int, block: int, quick: bool, pairs: int = 0) -> Case:
        def arguments() -> dict[str, Any]:
            words, split = _words(TYPES[name], *[E] * bool(pairs)), gemv.Split(block, 8, 4)
            ids = meta(pairs, dtype=torch.int64) if pairs else None
            return gemv.arguments(meta(rows, K), words, _sums(8, pairs or rows, N), split, ids=ids, per_x=pairs or 1)

        kernel = f"gemv{' of experts' if pairs else ''}, {block} wide"
        return Case(kernel, name, str(rows), gemv.gemv_kernel, arguments, block * gemv.LINES * gemv.STEP, quick)

    for name in TYPES:
        yield case(name, 1, 128, name in ("Q4_K", "MXFP4"))
    yield from (case("Q4_K", rows, 128, False) for rows in (2, 4))
    yield from (case(name, 1, 256, False) for name in ("Q4_K", "Q6_K"))
    yield case("Q4_K", 1, 128, False, pairs=8)


def _dot_cases() -> Iterator[Case]:
    def case(name: str, rows: int, quick: bool, grouped: bool = False) -> Case:
        per = 32 // layouts.PLANES[TYPES[name].bits][0]
        tiles = dot.Tiles(rows, 64, 8, 4, per)

        def arguments() -> dict[str, Any]:
            x, out = meta(TOKENS, per, tiles.width), _sums(8, TOKENS * (PER_TOKEN if grouped else 1), N)
            words = _words(TYPES[name], *[E] * grouped)
            return dot.arguments(x, words, out, tiles, blocks=_blocks() if grouped else None)

        kernel, weights = "dot of experts" if grouped else "dot", 64 * dot.LINES * per
        return Case(kernel, name, str(rows), dot.dot_kernel, arguments, weights, quick)

    for name in TYPES:
        yield case(name, 16, False)
    yield from (case("Q4_K", rows, rows == 64) for rows in (32, 64))
    yield from (case("Q4_K", rows, rows == 16, grouped=True) for rows in (16, 64))


def _blocks() -> dot.Blocks:
    return dot.Blocks(*(meta(TOKENS * PER_TOKEN, dtype=torch.int32) for _ in range(4)), per_x=PER_TOKEN)


def _other_cases() -> Iterator[Case]:
    pairs, ids = TOKENS * PER_TOKEN, meta(TOKENS, PER_TOKEN, dtype=torch.int64)
    q4 = TYPES["Q4_K"]
    experts = Experts((w.empty(q4, (E, 2 * N, K), "meta"),), w.empty(q4, (E, K, N), "meta"), Glu())
    counts = meta(E, dtype=torch.int32)
    for name in ("Q4_K", "Q6_K"):
        yield Case("dequantize", name, "", dense.dequantize_kernel,
                   lambda name=name: dense.arguments(meta(K, N), _words(TYPES[name])))  # fmt: skip
    x = meta(TOKENS, K)
    for kernel, function, arguments in (
        ("arrange", dot.arrange_kernel, lambda: dot.arrange_arguments(x, meta(TOKENS, 8, K // 8))),
        ("add shares", gemv.add_shares_kernel, lambda: gemv.add_shares_arguments(_sums(8, TOKENS, N), meta(TOKENS, N))),
        ("count", grouping.count_kernel, lambda: grouping.count_arguments(ids, counts)),
        ("place", grouping.place_kernel, lambda: grouping.place_arguments(ids, counts, _blocks(), E, 16)),
        ("activate", gating.activate_kernel,
         lambda: gating.arguments(experts, _sums(4, pairs, 2 * N), ids.view(-1), meta(pairs, 8, N // 8))),
        ("combine", combining.combine_kernel,
         lambda: combining.arguments(experts, _sums(4, pairs, K), ids, meta(TOKENS, PER_TOKEN), x)),
    ):  # fmt: skip
        yield Case(kernel, "", "", function, arguments)


CASES = [*_gemv_cases(), *_dot_cases(), *_other_cases()]


def compile_case(case: Case, target: str) -> Row:
    warp = AMD.get(target, 32)
    with mock.patch.object(gemv, "warp_size", lambda _: warp), mock.patch.object(dot, "warp_size", lambda _: warp):
        arguments = case.arguments()
    made = compile_kernel(case.function, arguments, target)
    threads = arguments["num_warps"] * warp
    per_weight = len(made.loop) * threads / case.weights if case.weights else 0.0
    wide = made.has(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10|load_(dwordx4|b128)")
    matrix = [name for name in ("wgmma", "mma.sync", "mfma", "wmma") if name in made.code]
    return Row(case.name, target, made.registers, made.spills, made.shared, round(per_weight, 2), wide, *matrix[:1] or [""])


# --- the table -------------------------------------------------------------------------------------------------------


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tables(rows: list[Row]) -> Iterator[str]:
    by = {(row.name, row.target): row for row in rows}
    names = list(dict.fromkeys(row.name for row in rows))
    head = [_line(["kernel", "weights", "rows", *TARGETS]), _line(["---"] * (3 + len(TARGETS)))]
    yield "## Instructions for each weight\n"
    yield from head
    for name in names:
        if any(by[name, target].per_weight for target in TARGETS):
            yield _line([name, *(f"{by[name, target].per_weight:.2f}" for target in TARGETS)])
    yield "\n## Registers of a thread, KB of shared memory\n"
    yield from head
    for name in names:
        cells = (by[name, target] for target in TARGETS)
        yield _line([name, *(f"{c.registers}, {c.shared / 1024:.1f}{f', {c.spills} B spilled' * bool(c.spills)}" for c in cells)])


def _estimates(rows: list[Row]) -> Iterator[str]:
    """Bytes of weights a cycle that a multiprocessor can issue for, and the share of the memory's that this is."""
    by = {(row.name, row.target): row for row in rows}
    yield "\n## GEMV of one row: what issuing allows, as a share of the memory's bandwidth (an estimate, not measured)\n"
    yield _line(["weights", "bytes a weight", *(f"{chip}: bytes a cycle, share" for chip in CHIPS)])
    yield _line(["---"] * (2 + len(CHIPS)))
    for name, layout in TYPES.items():
        size = layout.nbytes((N, K)) / (N * K)
        cells = []
        for target, count, ghz, bandwidth in CHIPS.values():
            issued = 128 / by[f"gemv, 128 wide | {name} | 1", target].per_weight * size
            cells.append(f"{issued:.1f}, {issued / (bandwidth / ghz / count):.0%}")
        yield _line([name, f"{size:.3f}", *cells])


def write(rows: list[Row]) -> None:
    text = (
        f"# What the GPU kernels are compiled to\n\nMade by `python -m tests.bench.bench_kernels` with Triton {triton.__version__}; "
        "no GPU was asked. Weights are\n[2048, 4096], x is bf16, 128 experts. A loop's instructions are those of all threads over "
        "the weights they decode.\nPublished figures of chips are in the program.\n"
    )
    TABLE.write_text("\n".join([text, *_tables(rows), *_estimates(rows)]) + "\n")


def per_weight_of_table() -> dict[tuple[str, str], float]:
    """(name of a case, target) -> instructions for each weight, as the table has it."""
    found = {}
    section = TABLE.read_text().split("## ")[1]
    for line in section.splitlines()[4:]:
        cells = [cell.strip() for cell in line.strip("|\n ").split("|")]
        if len(cells) == 3 + len(TARGETS):
            found |= {(" | ".join(cells[:3]), t): float(v) for t, v in zip(TARGETS, cells[3:], strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the few cases that the tests compile, and no table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # each launch says what it wants
    rows = []
    for case in CASES:
        for target in TARGETS if case.quick or not options.quick else ():
            rows.append(compile_case(case, target))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not options.quick:
        write(rows)


if __name__ == "__main__":
    main()
