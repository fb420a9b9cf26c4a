"""RMSNorm, alone or with the residual's sum before it: x * rsqrt(mean(x^2) + eps) * w, or * (1 + w).

Computed in float32 and rounded once; transformers' modules round x * rsqrt(..) to the model's type before w, too.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels.compiler import jit, launch, launchable, tl

MOST = 1 << 16
"""Values of a row that a program holds; longer rows are computed by the reference."""


@jit
def norm_kernel(
    x, weight, residual, total, out, H, A, eps, x_token, x_head, residual_token, residual_head, out_token, out_head,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, A, H]; or residual + x, rounded, which becomes total, of the residual's strides. Grid (T * A,)."""
    token = (tl.program_id(0) // A).to(tl.int64)
    head = tl.program_id(0) % A
    column = tl.arange(0, BLOCK)
    keep = column < H
    value = tl.load(x + token * x_token + head * x_head + column, mask=keep, other=0).to(tl.float32)
    if residual is not None:
        at = token * residual_token + head * residual_head + column
        both = (tl.load(residual + at, mask=keep, other=0).to(tl.float32) + value).to(residual.dtype.element_ty)
        tl.store(total + at, both, mask=keep)
        value = both.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / H + eps)
    if weight is not None:
        factor = tl.load(weight + column, mask=keep, other=0).to(tl.float32)
        if ONE:
            factor += 1
        value *= factor
    tl.store(out + token * out_token + head * out_head + column, value.to(out.dtype.element_ty), mask=keep)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None, plus_one: bool = False,
    out: Tensor | None = None, total: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, H] or [T, A, H] -> the same, in x's type. weight [H], or None for none; plus_one: factors are 1 + weight.

    residual, x's shape and type: residual + x is what is normed, and becomes total, of its strides, or residual itself.
    out: None for a new one; may be x. Values of a row are contiguous, other strides free. Raises UnsupportedError for
    what does not fit.
    """
    others = [other for other in (residual, out, total) if other is not None]
    fits = x.dim() in (2, 3) and all(other.shape == x.shape and other.dtype == x.dtype for other in others)
    fits = fits and (weight is None or (weight.shape == x.shape[-1:] and weight.stride(0) == 1))
    fits = fits and (total is None or (residual is not None and total.stride() == residual.stride()))
    if not fits or any(tensor.stride(-1) != 1 or tensor.device != x.device for tensor in (x, *others)):
        raise UnsupportedError(
            f"RMSNorm: found x {list(x.shape)}, {', '.join(str(list(other.shape)) for other in others)} and a weight "
            f"{None if weight is None else list(weight.shape)}, expected [T, (A,) H] of one type, and [H]."
        )
    out = torch.empty_like(x) if out is None else out
    if not launchable(x.device) or x.shape[-1] > MOST:
        return reference(x, weight, eps, residual, plus_one, out, total)
    if x.numel():
        made = arguments(x, weight, eps, residual, plus_one, out, total)
        launch(norm_kernel, (x.shape[:-1].numel(),), x.device, made)
    return out


def arguments(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, plus_one: bool, out: Tensor,
    total: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `norm_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    width = x.shape[-1]
    strides = lambda tensor: (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1) if x.dim() == 3 else 0)  # noqa: E731
    x_token, x_head = strides(x)
    residual_token, residual_head = strides(residual)
    out_token, out_head = strides(out)
    return {
        "x": x, "weight": weight, "residual": residual, "total": residual if total is None else total,
        "out": out, "H": width, "A": x.shape[1] if x.dim() == 3 else 1,
        "eps": float(eps), "x_token": x_token, "x_head": x_head, "residual_token": residual_token,
        "residual_head": residual_head, "out_token": out_token, "out_head": out_head, "ONE": plus_one,
        "BLOCK": 1 << (width - 1).bit_length(), "num_warps": min(16, 1 << (max(1, width // 512) - 1).bit_length()),
    }  # fmt: skip


def reference(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, plus_one: bool = False,
    out: Tensor | None = None, total: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the kernel computes, in torch."""
    if residual is not None:
        x = (residual if total is None else total).copy_(residual.float() + x.float())
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * (weight.float() + plus_one)
    return value.to(x.dtype) if out is None else out.copy_(value)
