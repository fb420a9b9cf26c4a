"""What the GPU kernels of attention, and of what is around it, are compiled to, for GPUs that need not be there.

`python -m tests.bench.bench_kernels_of_attention` writes KERNELS_OF_ATTENTION.md beside this file: registers, shared
memory, spills and instructions by kernel and chip. What it says of speed is instructions, not time. Needs Triton, whose
wheel brings the compilers and disassemblers. tests/kernels/test_compiled_attention.py compiles some of the same.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from ktransformers.kernels import cache, context, gqa_decode, keep, mla_decode, norm, rotary, router, swiglu
from ktransformers.kernels.context import Context, Cut, Tiles
from ktransformers.native.experts import Glu
from ktransformers.native.router import Choice
from tests.kernels.compiling import TARGETS, compile_kernel, meta

TABLE = Path(__file__).with_name("KERNELS_OF_ATTENTION.md")

B, SHARES, PAGES, PER_SEQUENCE = 4, 16, 4096, 512

ONE_EACH = ("sm_80", "gfx942")
"""Chips whose compilers see what is not bound to a chip's size or matrix units."""


@dataclass(frozen=True)
class Case:
    """One kernel as one model launches it. quick: the chips that the tests compile it for."""

    kernel: str
    model: str
    function: Any
    arguments: Callable[[str], dict[str, Any]]
    quick: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS

    @property
    def name(self) -> str:
        return f"{self.kernel} | {self.model}"


@dataclass(frozen=True)
class Row:
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    per_token: float
    wide: bool
    matrix: str


def _floats(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def _ints(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def _long(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def _context() -> Context:
    return Context(_ints(B, PER_SEQUENCE), _ints(B))


def _mla(heads: int, group: int = 0) -> Callable[[str], dict[str, Any]]:
    def arguments(target: str) -> dict[str, Any]:
        tiles = mla_decode.tiles_for(target, heads, bool(group))
        row = mla_decode.row_bytes(512, 64, group) if group else 576
        pages = meta(PAGES, 64, row, dtype=torch.uint8 if group else torch.bfloat16)
        out, weights = _floats(B, SHARES, heads, 512), _floats(B, SHARES, heads)
        cut = Cut(tiles, SHARES)
        return mla_decode.arguments(meta(B, 1, heads, 576), pages, _context(), out, weights, 512, 0.1, group, cut)

    return arguments


def _gqa(heads: int, kv_heads: int, size: int, tokens: int = 1, **scores: Any) -> Callable[[str], dict[str, Any]]:
    def arguments(target: str) -> dict[str, Any]:
        tiles = gqa_decode.tiles_for(target, tokens * heads // kv_heads, size)
        pages = meta(PAGES, 64, kv_heads, size)
        out, weights = _floats(B, SHARES, tokens * heads, size), _floats(B, SHARES, tokens * heads)
        given = gqa_decode.Scores(0.1, **scores)
        return gqa_decode.arguments(
            meta(B, tokens, heads, size), pages, pages, _context(), given, out, weights, Cut(tiles, SHARES)
        )

    return arguments


def _attention_cases() -> Iterator[Case]:
    not_rdna = tuple(target for target in TARGETS if target != "gfx1100")
    mla, gqa = mla_decode.mla_kernel, gqa_decode.gqa_kernel
    yield Case("MLA decode", "16 heads", mla, _mla(16), ("sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"))
    yield Case("MLA decode", "128 heads", mla, _mla(128), ("sm_86", "sm_90"))
    yield Case("MLA decode, FP8 by 128", "16 heads", mla, _mla(16, 128), ("sm_120",), not_rdna)
    yield Case("MLA decode, FP8 by token", "16 heads", mla, _mla(16, 512), ("gfx942",), not_rdna)
    yield Case("GQA decode", "Qwen3-30B-A3B", gqa, _gqa(32, 4, 128), ("sm_80", "sm_90", "gfx942", "gfx1100"))
    yield Case(
        "GQA decode",
        "gpt-oss, window and sinks",
        gqa,
        _gqa(64, 8, 64, window=128, sinks=_floats(64)),
        ("sm_86", "gfx1100"),
    )
    yield Case("GQA decode", "Gemma, soft cap", gqa, _gqa(16, 8, 256, cap=50.0), ("sm_89", "gfx1100"))
    yield Case("GQA decode", "heads of 512", gqa, _gqa(16, 2, 512), ("sm_120",), not_rdna)
    yield Case("GQA decode, 8 new tokens", "Qwen3-30B-A3B", gqa, _gqa(32, 4, 128, 8), ("sm_90",))
    cut = Cut(Tiles(16, 32, 8, 5), SHARES)
    for model, heads, value in (("MLA, 128 heads", 128, 512), ("Qwen3-30B-A3B", 32, 128)):
        yield Case("shares added", model, context.add_kernel, lambda _, heads=heads, value=value: context.add_arguments(
            _floats(B, SHARES, heads, value), _floats(B, SHARES, heads), _context(), meta(B, heads, value), 1, cut,
        ), ONE_EACH)  # fmt: skip


def _other_cases() -> Iterator[Case]:
    product = meta(B, 40 * 128)
    q, k, v = (part.unflatten(1, (-1, 128)) for part in product.split([32 * 128, 4 * 128, 4 * 128], 1))
    pages, latents = meta(PAGES, 64, 4, 128), meta(PAGES, 64, 1, 576).split((512, 64), 3)
    hidden, angles, ids, slots = meta(B, 7168), _floats(4096, 64), _long(B, 8), _long(B)
    v3 = Choice(8, "sigmoid", "score", divide="sum", groups=8, groups_kept=4)
    weight = meta(128)
    for kernel, model, function, arguments in (
        ("slots", "", cache.slots_kernel, lambda _: cache.slots_arguments(_ints(B, PER_SEQUENCE), _ints(B), slots)),
        ("append", "Qwen3-30B-A3B", cache.append_kernel, lambda _: cache.append_arguments(k, v, slots, pages, pages)),
        ("append", "MLA", cache.append_kernel,
         lambda _: cache.append_arguments(meta(B, 1, 512), meta(B, 1, 64), slots, *latents)),
        ("append", "MLA, FP8 by 128", cache.append_fp8_kernel, lambda _: cache.append_fp8_arguments(
            meta(B, 512), meta(B, 64), slots, meta(PAGES, 64, 656, dtype=torch.uint8), 128)),
        ("RMSNorm + residual", "7168", norm.norm_kernel,
         lambda _: norm.arguments(hidden, meta(7168), 1e-6, hidden, False, hidden)),
        ("rotary, halves", "after norms", rotary.rotary_kernel,
         lambda _: rotary.arguments(q, k, angles, angles, slots, "halves", weight, weight, 1e-6)),
        ("rotary, parted", "", rotary.rotary_kernel, lambda _: rotary.arguments(q, k, angles, angles, slots, "parted")),
        ("norms, rotary, append", "Qwen3-30B-A3B", keep.keep_kernel,
         lambda _: keep.arguments(q, k, v, angles, angles, slots, pages, pages, slots, "halves", weight, weight, 1e-6)),
        ("norm, rotary, append", "MLA", keep.keep_latents_kernel, lambda _: keep.latents_arguments(
            meta(B, 128, 192)[..., 128:], meta(B, 512), meta(B, 64), angles[:, :32], angles[:, :32], slots,
            meta(PAGES, 64, 576), meta(B, 128, 576)[..., 512:], meta(512), 1e-6, slots, "parted")),
        ("norm, rotary, append", "MLA, FP8 by 128", keep.keep_latents_kernel, lambda _: keep.latents_arguments(
            meta(B, 128, 192)[..., 128:], meta(B, 512), meta(B, 64), angles[:, :32], angles[:, :32], slots,
            meta(PAGES, 64, 656, dtype=torch.uint8), meta(B, 128, 576)[..., 512:], meta(512), 1e-6, slots, "parted",
            128)),
        ("router", "DeepSeek-V3", router.router_kernel,
         lambda _: router.arguments(_floats(B, 256), v3, _floats(256), None, ids, _floats(B, 8))),
        ("router", "Qwen3-30B-A3B", router.router_kernel,
         lambda _: router.arguments(_floats(B, 128), Choice(8, divide="sum"), None, None, ids, _floats(B, 8))),
        ("SwiGLU", "", swiglu.glu_kernel,
         lambda _: swiglu.arguments(meta(B, 1536), meta(B, 1536), Glu(), meta(B, 1536))),
    ):  # fmt: skip
        yield Case(kernel, model, function, arguments, ONE_EACH)


CASES = [*_attention_cases(), *_other_cases()]


def compile_case(case: Case, target: str) -> Row:
    arguments = case.arguments(target)
    made = compile_kernel(case.function, arguments, target)
    nested = arguments.get("PIECE") != arguments.get("BR")  # queries in pieces: no loop has all instructions
    tokens = arguments["BN"] if "BH" in arguments and not nested else 0
    per_token = len(made.loop) * arguments["num_warps"] / tokens if tokens else 0.0
    wide = made.has(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10|load_(dwordx4|b128)")
    matrix = [name for name in ("wgmma", "mma.sync", "mfma", "wmma") if name in made.code]
    return Row(
        case.name, target, made.registers, made.spills, made.shared, round(per_token, 1), wide, *matrix[:1] or [""]
    )


# --- the table -------------------------------------------------------------------------------------------------------


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tables(rows: list[Row]) -> Iterator[str]:
    by = {(row.name, row.target): row for row in rows}
    names = list(dict.fromkeys(row.name for row in rows))
    head = [_line(["kernel", "model", *TARGETS]), _line(["---"] * (2 + len(TARGETS)))]

    def cells(name: str, say: Callable[[Row], str]) -> str:
        return _line([name, *(say(by[name, target]) if (name, target) in by else "-" for target in TARGETS)])

    yield "## Instructions of all warps of a program for each token of the context\n"
    yield from head
    yield from (cells(name, lambda row: f"{row.per_token or '-'}") for name in names if by[name, "sm_90"].per_token)
    yield "\n## Registers of a thread, KB of shared memory, matrix instructions\n"
    yield from head
    spilled = lambda row: f", {row.spills} B spilled" * bool(row.spills)  # noqa: E731
    for name in names:
        yield cells(name, lambda row: f"{row.registers}, {row.shared / 1024:.1f} {row.matrix}{spilled(row)}".strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the few cases that the tests compile, and no table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    rows = []
    for case in CASES:
        for target in case.quick if options.quick else case.targets:
            rows.append(compile_case(case, target))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not options.quick:
        made = f"Made by `python -m tests.bench.bench_kernels_of_attention` with Triton {triton.__version__}; no GPU was asked."
        TABLE.write_text(
            "\n".join(["# What the kernels of attention are compiled to\n", made + "\n", *_tables(rows)]) + "\n"
        )


if __name__ == "__main__":
    main()
