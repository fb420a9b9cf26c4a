"""Gradients of linears and experts on packed bytes, in torch: one matrix at a time is dequantized to fp32.

The readable reference: what is kept of a forward is its inputs, and all else is computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransformers.native.weights import dequantize

if TYPE_CHECKING:
    from ktransformers.native.experts import Experts, Glu

Term = tuple[Tensor | None, Tensor | None, float]
"""A [E, r, in], B [E, out, r] and scale of a low-rank adapter; A and B None where there is none."""

NO_TERM: Term = (None, None, 0.0)


def forward_adapted(
    experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor, first: Term = NO_TERM, down: Term = NO_TERM
) -> Tensor:
    """Experts with adapters on what multiplies the input (`first`: gate's rows before up's) and on `down`: [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    x = hidden.float()
    for e in range(experts.count):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if len(token):
            y = _expert(experts, e, x[token], first, down)
            out = out.index_add(0, token, y * weights[token, slot, None].float())
    return out.to(hidden.dtype)


def backward_adapted(
    experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor, d_out: Tensor, first: Term = NO_TERM,
    down: Term = NO_TERM,
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden [T, H], of weights [T, K] and of those of the adapters' A and B that are there."""
    given = [hidden, weights, *first[:2], *down[:2]]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        h, w, first_a, first_b, down_a, down_b = leaves
        out = forward_adapted(experts, h, ids, w, (first_a, first_b, first[2]), (down_a, down_b, down[2]))
        there = [t for t in leaves if t is not None]
        made = torch.autograd.grad(out, there, d_out, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(there, made, strict=True)]


def _expert(experts: Experts, e: int, x: Tensor, first: Term, down: Term) -> Tensor:
    """Rows [t, H] through expert `e`: [t, H]."""
    glu, parts = experts.glu, []
    for matrices, bias in ((experts.matrices[0], glu.gate_bias), (experts.matrices[1], glu.up_bias)):
        if matrices is not None:
            parts.append(F.linear(x, dequantize(matrices[e]), None if bias is None else bias[e].float()))
    if first[0] is not None:
        added = x @ first[0][e].float().T @ first[1][e].float().T * first[2]
        parts = [part + more for part, more in zip(parts, added.chunk(len(parts), -1), strict=True)]
    middle = gated(glu, *parts)
    bias = None if glu.down_bias is None else glu.down_bias[e].float()
    out = F.linear(middle, dequantize(experts.matrices[2][e]), bias)
    return out if down[0] is None else out + middle @ down[0][e].float().T @ down[1][e].float().T * down[2]


def gated(glu: Glu, *parts: Tensor) -> Tensor:
    """What down multiplies, of gate and up [t, I], or of up alone; the formula is Glu's."""
    if len(parts) == 1:
        return _ACTIVATIONS[glu.activation](parts[0])
    gate, up = parts[0].clamp(max=glu.limit), parts[1].clamp(-glu.limit, glu.limit)
    if glu.activation == "swigluoai":
        return gate * torch.sigmoid(glu.alpha * gate) * (up + 1)
    return _ACTIVATIONS[glu.activation](gate) * up


_ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
