"""activation(gate) * up of a dense MLP, in the ways that native's Glu names; gating.py has the formula."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import gating
from ktransformers.kernels.compiler import cdiv, jit, launch, launchable, tl
from ktransformers.kernels.gating import formula
from ktransformers.native.experts import Glu

BLOCK = 1024


@jit
def glu_kernel(
    gate, up, out, width, gate_stride, up_stride, out_stride, alpha, limit,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gate (or None) and up [T, I] -> out [T, I]. Grid (blocks of I, T)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = column < width
    second = tl.load(up + row * up_stride + column, mask=keep, other=0).to(tl.float32)
    if gate is None:
        value = formula(second, 1.0, ACTIVATION, alpha, limit, LIMITED)
    else:
        first = tl.load(gate + row * gate_stride + column, mask=keep, other=0).to(tl.float32)
        value = formula(first, second, ACTIVATION, alpha, limit, LIMITED)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=keep)


def glu(up: Tensor, gate: Tensor | None = None, how: Glu | None = None, out: Tensor | None = None) -> Tensor:
    """up and gate [T, I], rows contiguous, such as two halves of one product -> [T, I] in up's type.

    gate None: activation(up), without a limit. how: SiLU by default; its biases are the linears' own here, and refused.
    out may be up or gate. Raises UnsupportedError for what does not fit.
    """
    how = Glu() if how is None else how
    if any(bias is not None for bias in (how.gate_bias, how.up_bias, how.down_bias)):
        raise UnsupportedError("A dense MLP's biases belong to its linears, found them beside the activation.")
    others = [other for other in (gate, out) if other is not None]
    fits = up.dim() == 2 and all(other.shape == up.shape and other.device == up.device for other in others)
    if not fits or any(tensor.stride(1) != 1 for tensor in (up, *others)):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (up, *others))
        raise UnsupportedError(f"An activation of {shapes}, expected [T, I] of each, rows contiguous.")
    if not launchable(up.device):
        return reference(up, gate, how, out)
    out = torch.empty(up.shape, dtype=up.dtype, device=up.device) if out is None else out
    if out.numel():
        grid = (cdiv(up.shape[1], BLOCK), up.shape[0])
        launch(glu_kernel, grid, up.device, arguments(up, gate, how, out))
    return out


def arguments(up: Tensor, gate: Tensor | None, how: Glu, out: Tensor) -> dict[str, Any]:
    """What `glu_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    limited = gate is not None and how.limit != math.inf
    return {
        "gate": gate, "up": up, "out": out, "width": up.shape[1], "gate_stride": 0 if gate is None else gate.stride(0),
        "up_stride": up.stride(0), "out_stride": out.stride(0), "alpha": float(how.alpha),
        "limit": float(how.limit) if limited else 0.0, "ACTIVATION": how.activation, "LIMITED": limited, "BLOCK": BLOCK,
        "num_warps": 4,
    }  # fmt: skip


def reference(up: Tensor, gate: Tensor | None, how: Glu, out: Tensor | None = None) -> Tensor:
    """What the kernel computes, in torch: the experts' formula on one expert."""
    both = up.float() if gate is None else torch.cat([gate.float(), up.float()], 1)
    value = gating.reference(SimpleNamespace(glu=how, gated=gate is not None), both, 0)
    return value.to(up.dtype) if out is None else out.copy_(value)
