"""A training step of one layer of frozen experts: `python -m tests.bench.bench_sft`.

Milliseconds of the forward call, of the backward call, of both with adapters inside (rank 8, as PEFT's), and of the
same backward in torch: one expert's matrices dequantized at a time, products by torch on as many threads. They take turns in every round; a
figure is the least of its times, as others on a shared machine only ever add. Routing is uniform. Activations are fp32,
for BF16 weights bf16.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from ktransformers import native
from ktransformers.native.backward import backward_adapted, forward_adapted
from tests.bench.bench_native import SHAPES, Layer, routing

SHAPES["S4"] = (2048, 768, 64, 8)
TURNS = ("forward", "backward", "forward lora", "backward lora", "torch")


def in_torch(experts: native.Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, d_out: torch.Tensor):
    """Gradients of x and weights of silu experts, by the formulas of native/src/calls/moe_backward.c."""
    x, d_out = x.float(), d_out.float()
    d_x, d_weights = torch.zeros_like(x), torch.zeros_like(weights)
    for e in range(experts.count):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up, down = (native.dequantize(m[e]) for m in experts.matrices)
        rows, w = x[token], weights[token, slot, None]
        g, u, t = rows @ gate.T, rows @ up.T, d_out[token] @ down
        s = torch.sigmoid(g)
        d_weights[token, slot] = (t * F.silu(g) * u).sum(-1)
        d_x.index_add_(0, token, (w * t * u * s * (1 + g * (1 - s))) @ gate + (w * t * g * s) @ up)
    return d_x, d_weights


def adapters(layer: Layer, rank: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    sizes = ((layer.hidden, 2 * layer.inner), (layer.inner, layer.hidden))
    return [(torch.randn(layer.count, rank, i) / i**0.5, torch.randn(layer.count, o, rank), 0.5) for i, o in sizes]


def measure(layer: Layer, tokens: int, rank: int, budget: float, with_torch: bool) -> dict[str, float]:
    """Milliseconds by TURNS."""
    generator = torch.Generator().manual_seed(0)
    x, d_out = (torch.randn(tokens, layer.hidden, generator=generator).to(layer.dtype) for _ in range(2))
    call = (x, *routing(layer, tokens, "uniform", generator))
    terms = adapters(layer, rank)
    work = {
        "forward": lambda: layer.experts.compute(*call),
        "backward": lambda: layer.experts.backward(*call, d_out),
        "forward lora": lambda: forward_adapted(layer.experts, *call, *terms),
        "backward lora": lambda: backward_adapted(layer.experts, *call, d_out, *terms),
        "torch": lambda: in_torch(layer.experts, *call, d_out),
    }
    if not with_torch:
        del work["torch"]
    took: dict[str, list[float]] = {name: [] for name in work}
    until = time.perf_counter() + budget
    while time.perf_counter() < until or len(took["forward"]) < 2:
        for name, run in work.items():
            if name == "torch" and len(took[name]) == 2:
                continue
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: 1000 * min(times) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="Q4_K,Q8_0,BF16", help="of weights, separated by commas")
    parser.add_argument("--shapes", default="S4", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--tokens", default="64,512,2048", help="of a call")
    parser.add_argument("--isa", help="instruction sets", default=native.isa())
    parser.add_argument("--threads", type=int, help="of the pool and of torch")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--seconds", type=float, default=4, help="for each line")
    parser.add_argument("--no-torch", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    if args.threads:
        native.set_threads(args.threads)
    torch.set_num_threads(native.threads())
    table = Table("type", "isa", "T", *(f"{name} ms" for name in TURNS), "bwd/fwd", "torch/bwd", "lora %")
    found = []
    for shape in args.shapes.split(","):
        for name in args.types.split(","):
            layer = Layer(name, shape)
            for isa in args.isa.split(","):
                native.set_isa(isa)
                for tokens in map(int, args.tokens.split(",")):
                    ms = measure(layer, tokens, args.rank, args.seconds, not args.no_torch)
                    step, adapted = ms["forward"] + ms["backward"], ms["forward lora"] + ms["backward lora"]
                    shares = (
                        f"{ms['backward'] / ms['forward']:.2f}",
                        f"{ms['torch'] / ms['backward']:.1f}" if "torch" in ms else "-",
                        f"{100 * (adapted / step - 1):.1f}",
                    )
                    figures = (f"{ms[turn]:.1f}" if turn in ms else "-" for turn in TURNS)
                    table.add_row(name, isa, str(tokens), *figures, *shares)
                    found.append({"type": name, "shape": shape, "isa": isa, "threads": native.threads(), "tokens": tokens,
                                  "rank": args.rank, **ms})  # fmt: skip
    Console(width=130).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
