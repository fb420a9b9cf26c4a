"""A small MoE layer and two linears through the C library, held to torch on the dequantized weights. Not timed."""

from dataclasses import dataclass

import torch

from ktransformers import native
from ktransformers.quants.blocks import Packed, quant_type

HIDDEN, INNER, EXPERTS, PER_TOKEN = 256, 256, 4, 2
TOKENS = (1, 65)  # decode, and a prefill that is no multiple of any tile
LIMITS = {"int8": 0.025, "bf16": 0.008}
"""Largest mean|d| / mean|ref| by the rounding that the path does to activations; twice what right kernels show."""
SCALES = {"Q4_K": {0: 1.0, 2: 7.5}, "Q6_K": {208: 0.13}, "Q8_0": {0: 2.4}}
"""Byte of a block -> the fp16 scale there, times 2900: random codes then make weights around 1 / 16."""

WORST = 4  # times the limit, for the largest |d| over the largest |ref|: one wrong row hides in a mean


@dataclass(frozen=True)
class KernelResult:
    """One instruction set: the largest of the relative errors `errors` (by what was computed), and whether all are in
    their limits."""

    isa: str
    error: float
    ok: bool
    errors: dict[str, float]


def check_kernels(isas: list[str]) -> list[KernelResult]:
    """Run every kernel on every one of `isas`; the instruction set in use is the same afterwards."""
    cases, before = _Cases(), native.isa()
    try:
        return [cases.run(isa) for isa in isas]
    finally:
        native.set_isa(before)


class _Cases:
    """Weights, inputs and right answers, made once."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)

        def weight(name: str, rows: int, columns: int) -> Packed:
            kind = quant_type(name)
            if kind.torch_dtype is not None:
                values = torch.randn(rows, columns, generator=random) / 16
                return Packed(values.to(kind.torch_dtype).view(torch.uint8).view(-1), kind, (rows, columns))
            blocks = rows * columns // kind.block
            data = torch.randint(0, 256, (blocks, kind.nbytes), dtype=torch.uint8, generator=random)
            for at, scale in SCALES[name].items():
                data[:, at : at + 2] = torch.tensor([scale / 2900], dtype=torch.float16).view(torch.uint8)
            return Packed(data.view(-1), kind, (rows, columns))

        gate, up = ([weight("Q4_K", INNER, HIDDEN) for _ in range(EXPERTS)] for _ in range(2))
        down = [weight("Q6_K", HIDDEN, INNER) for _ in range(EXPERTS)]
        self.experts = native.Experts(gate, up, down, name="experts")
        self.linears = {
            "int8": native.Linear(weight("Q8_0", 96, HIDDEN)),
            "bf16": native.Linear(weight("BF16", 96, HIDDEN)),
        }
        self.hidden = torch.randn(max(TOKENS), HIDDEN, generator=random)
        self.ids = torch.rand(max(TOKENS), EXPERTS, generator=random).argsort(1)[:, :PER_TOKEN]
        self.weights = torch.rand(max(TOKENS), PER_TOKEN, generator=random)
        self.right = _moe(gate, up, down, self.hidden, self.ids, self.weights)

    def run(self, isa: str) -> KernelResult:
        native.set_isa(isa)
        errors, ok = {}, True
        for name, kind, found, right in self._answers():
            difference, right = (found.double() - right).abs(), right.abs()
            error = (difference.mean() / right.mean()).item()
            worst = (difference.max() / right.max()).item()
            errors[name] = error
            ok = ok and error <= LIMITS[kind] and worst <= WORST * LIMITS[kind]  # never true for NaN
        largest = max(errors.values(), key=lambda e: float("inf") if e != e else e)
        return KernelResult(isa, largest, ok, errors)

    def _answers(self):
        """(what, kind of rounding, what C says, what is right), one after the other."""
        for tokens in TOKENS:
            hidden, ids, weights = self.hidden[:tokens], self.ids[:tokens], self.weights[:tokens]
            yield f"experts T={tokens}", "int8", self.experts(hidden, ids, weights), self.right[:tokens]
            for kind, linear in self.linears.items():
                x = hidden.to(torch.bfloat16) if kind == "bf16" else hidden
                right = x.double() @ linear.weight.dequantize().double().T
                yield f"{linear.weight.type.name} T={tokens}", kind, linear(x), right


def _moe(gate: list, up: list, down: list, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor):
    """The layer in torch's fp64: [T, H]."""
    x, out = hidden.double(), torch.zeros(hidden.shape, dtype=torch.float64)
    for e in range(len(gate)):
        g, u, d = (w[e].dequantize().double() for w in (gate, up, down))
        share = (weights.double() * (ids == e)).sum(1, keepdim=True)
        out += share * ((torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T)
    return out
