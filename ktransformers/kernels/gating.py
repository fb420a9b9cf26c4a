"""Between an expert's products: shares added, biases, and activation(gate) * up in the ways that families publish.

operators/gating.py recognizes the formulas, native's Glu names them, the C library and this compute them.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransformers.kernels.compiler import cdiv, jit, launch, tl

if TYPE_CHECKING:
    from ktransformers.kernels.experts import Experts

BLOCK = 512


@jit
def formula(gate, up, ACTIVATION: tl.constexpr, alpha, limit, LIMITED: tl.constexpr):
    """The formula of operators/gating.py on float32; without a gate `gate` is up and up is 1."""
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if ACTIVATION == "silu":
        return gate / (1 + tl.exp(-gate)) * up
    elif ACTIVATION == "swigluoai":
        return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
    elif ACTIVATION == "gelu":
        return gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "relu":
        return tl.maximum(gate, 0) * up
    elif ACTIVATION == "relu2":
        return tl.maximum(gate, 0) * tl.maximum(gate, 0) * up
    else:  # gelu_tanh: 0.5 (1 + tanh u) is sigmoid(2 u)
        return gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up


@jit
def activate_kernel(
    sums, ids, gate_bias, up_bias, out, width, experts, shares, share_stride, row_stride, X, out_stride, alpha, limit,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [shares, pairs, width or 2 width] -> out [pairs, PER, X], zeros from width on. Grid (blocks of X, pairs).

    Columns PER apart lie beside each other, as `dot_kernel` reads them; PER 1 is in order.
    """
    pair = tl.program_id(1)
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= experts):
        return
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = column < width
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    sums += pair.to(tl.int64) * row_stride
    for _ in range(shares):
        first += tl.load(sums + column, mask=keep, other=0).to(tl.float32)
        if GATED:
            second += tl.load(sums + width + column, mask=keep, other=0).to(tl.float32)
        sums += share_stride
    at = expert.to(tl.int64) * width + column
    if gate_bias is not None:
        first += tl.load(gate_bias + at, mask=keep, other=0).to(tl.float32)
    if up_bias is not None:
        bias = tl.load(up_bias + at, mask=keep, other=0).to(tl.float32)
        if GATED:
            second += bias
        else:
            first += bias
    if not GATED:
        second += 1
    value = tl.where(keep, formula(first, second, ACTIVATION, alpha, limit, LIMITED), 0)
    to = out + pair.to(tl.int64) * out_stride + column % PER * X + column // PER
    tl.store(to, value.to(out.dtype.element_ty), mask=column < PER * X)


def activate(experts: "Experts", sums: Tensor, ids: Tensor, out: Tensor) -> None:
    """sums [shares, pairs, I or 2I], ids [pairs] -> out [pairs, per, width]: the rows that down takes."""
    grid = (cdiv(out.shape[1] * out.shape[2], BLOCK), ids.numel())
    launch(activate_kernel, grid, out.device, arguments(experts, sums, ids, out))


def arguments(experts: "Experts", sums: Tensor, ids: Tensor, out: Tensor) -> dict[str, Any]:
    """What `activate_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    glu, limited = experts.glu, experts.gated and experts.glu.limit != math.inf
    return {
        "sums": sums, "ids": ids, "gate_bias": glu.gate_bias, "up_bias": glu.up_bias, "out": out,
        "width": experts.down.shape[2], "experts": experts.down.shape[0], "shares": sums.shape[0],
        "share_stride": sums.stride(0), "row_stride": sums.stride(1), "X": out.shape[2], "out_stride": out.stride(0),
        "alpha": float(glu.alpha), "limit": float(glu.limit) if limited else 0.0, "GATED": experts.gated,
        "ACTIVATION": glu.activation, "LIMITED": limited, "PER": out.shape[1], "BLOCK": BLOCK, "num_warps": 4,
    }  # fmt: skip


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(experts: "Experts", first: Tensor, e: int) -> Tensor:
    """float32 [n, I or 2I] of expert `e` -> [n, I]."""
    glu = experts.glu
    if not experts.gated:
        return _ACTIVATIONS[glu.activation](first + row(glu.up_bias, e))
    gate, up = first.chunk(2, dim=1)
    gate, up = gate + row(glu.gate_bias, e), up + row(glu.up_bias, e)
    gate, up = gate.clamp(max=glu.limit), up.clamp(-glu.limit, glu.limit)
    if glu.activation == "swigluoai":
        return gate * torch.sigmoid(glu.alpha * gate) * (up + 1)
    return _ACTIVATIONS[glu.activation](gate) * up


def row(bias: Tensor | None, e: int) -> Tensor | float:
    """An expert's bias, 0 for None."""
    return 0.0 if bias is None else bias[e].float()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}  # fmt: skip
