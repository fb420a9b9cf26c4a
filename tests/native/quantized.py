"""The library's rule for int8 activations (kt_native.h, Numerics) in torch, operation by operation: what its kernels may
differ from is then only the order of their own sums."""

import torch

LEVELS = torch.tensor(127.0)
LESS = torch.tensor(126.0) / LEVELS


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """fp32 [..., 32] -> [..., 1], pairwise as act.h adds."""
    v = terms[..., :16] + terms[..., 16:]
    v = v[..., :8] + v[..., 8:]
    v = v[..., :4] + v[..., 4:]
    return ((v[..., 0] + v[..., 2]) + (v[..., 1] + v[..., 3])).unsqueeze(-1)


def _fit(groups: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, sum of activation * code and sum of code^2 of each group."""
    moved = groups * factor
    codes = torch.round(moved)
    return codes, _sum(moved * codes), _sum(codes * codes)


def quantized(x: torch.Tensor) -> torch.Tensor:
    """fp32 [T, cols], finite and no group all zero -> the values that the int8 codes and scales stand for, fp64."""
    groups = x.view(len(x), -1, 32)
    top = groups.abs().amax(-1, keepdim=True)
    factor = LEVELS / top
    codes, product, square = _fit(groups, factor)
    fewer, product2, square2 = _fit(groups, factor * LESS)
    second = product2 * product2 * square > product * product * square2 * (LESS * LESS)
    scale = product / square * (top * (1.0 / LEVELS))
    scale2 = product2 / square2 * (top * (1.0 / (LEVELS * LESS)))
    return (torch.where(second, fewer, codes).double() * torch.where(second, scale2, scale).double()).view(x.shape)
