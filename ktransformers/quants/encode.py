"""Numbers to packed blocks in torch: the readable reference that the C encoder (native/encode.py) is held to by the
tests. Nothing in the package computes with it. Vectorised, on the CPU.

Q8_0 rounds exactly as the gguf package does. The K formats have no reference encoder there, and a format only
says how to decode, so here the scales are searched: for each sub-block many starting scales are tried, each
is fitted to its own codes by least squares, and the best one is kept; then the integer scales are searched
around their rounded values with the error of the real decoded block. Decode every result with quants.py.
It lowers the error by 9 to 15 % against rounding to the widest weight, at 0.1 s per million weights and core.

Letters: B blocks, S sub-blocks in a block, W weights in a sub-block.
"""

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.quants.blocks import QuantType, quant_type

WEIGHTS_AT_ONCE = 1 << 18
"""Weights encoded at a time; small enough that the search stays in the cache."""

_STARTS = 16  # starting scales tried per sub-block
_ROUNDS = 2  # least-squares fits per start


def quantize(tensor: Tensor, kind: QuantType | str) -> Tensor:
    """Encode a float tensor [..., columns] as `kind`: uint8 [..., bytes per row].

    Raises WeightError when rows are not whole blocks, or numbers are not finite or beyond the format's range,
    and UnsupportedError for a format with no encoder here.
    """
    kind = quant_type(kind)
    row_bytes = kind.row_bytes(tensor.shape[-1])
    flat = tensor.detach().to("cpu").contiguous().view(-1, kind.block)
    if kind.torch_dtype is not None:
        packed = flat.to(kind.torch_dtype)
        _require(bool((packed.isfinite() | ~flat.isfinite()).all()), kind, "a number is too large for it")
        return packed.view(torch.uint8).view(*tensor.shape[:-1], row_bytes)
    if kind.name not in _ENCODERS:
        raise UnsupportedError(
            f"No encoder for {kind.name}. There are F32, F16, BF16, {', '.join(_ENCODERS)}."
        )
    out = torch.empty(len(flat), kind.nbytes, dtype=torch.uint8, device="cpu")
    step = max(1, WEIGHTS_AT_ONCE // kind.block)
    for start in range(0, len(flat), step):
        blocks = flat[start : start + step].float()
        _require(bool(blocks.isfinite().all()), kind, "the weights hold NaN or infinity")
        out[start : start + step] = _ENCODERS[kind.name](blocks)
    return out.view(*tensor.shape[:-1], row_bytes)


def _require(ok: bool, kind: QuantType, what: str) -> None:
    if not ok:
        raise WeightError(
            f"Cannot encode as {kind.name}: {what}. Check the weights, or keep this tensor as F32."
        )


def _half_bytes(values: Tensor) -> Tensor:
    """fp32 [B, 1] rounded to fp16, as bytes [B, 2]."""
    half = values.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise WeightError("Cannot encode: a block's scale is too large for fp16. Keep this tensor as F32.")
    return half.view(torch.uint8)


def _inverse(values: Tensor) -> Tensor:
    """1/values, and 0 for 0."""
    return torch.where(values == 0, torch.zeros_like(values), 1 / values)


def _pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Inverse of quants._fields: uint8 [..., 8/bits, n] into bytes [..., n], first field in the low bits."""
    out = torch.zeros_like(codes[..., 0, :])
    for i in range(8 // bits):
        out |= codes[..., i, :] << (i * bits)
    return out


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    rounded = whole + (2 * (size - whole)).floor()  # half away from zero, as C's roundf
    codes = (scaled.sign() * rounded).to(torch.int8)
    return torch.cat([_half_bytes(d), codes.view(torch.uint8)], 1)


# --- Q4_K and Q5_K: weight ≈ d·scale·code - dmin·minimum, scale and minimum of six bits per 32 weights -----


def _fit_affine(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of x [..., W] ≈ scale·codes - minimum with both not negative: two [..., 1]."""
    n = x.shape[-1]
    sum_q, sum_qq = codes.sum(-1, keepdim=True), (codes * codes).sum(-1, keepdim=True)
    sum_x, sum_qx = x.sum(-1, keepdim=True), (codes * x).sum(-1, keepdim=True)
    scale = (n * sum_qx - sum_q * sum_x) * _inverse(n * sum_qq - sum_q * sum_q)
    minimum = (scale * sum_q - sum_x) / n
    alone = sum_qx * _inverse(sum_qq)  # the best scale when the minimum has to be zero
    scale = torch.where(minimum < 0, alone, scale).clamp(min=0)
    return scale, minimum.clamp(min=0)


def _affine_codes(x: Tensor, scale: Tensor, minimum: Tensor, top: int) -> Tensor:
    return ((x + minimum) * _inverse(scale)).round_().clamp_(0, top)


def _affine_error(x: Tensor, scale: Tensor, minimum: Tensor, top: int) -> Tensor:
    codes = _affine_codes(x, scale, minimum, top)
    return (codes.mul_(scale).sub_(minimum).sub_(x)).square_().sum(-1, keepdim=True)


def _search_affine(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best real-valued scale and minimum of each sub-block: x [B, S, W] -> two [B, S, 1]."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    spread = (x.amax(-1, keepdim=True) - low).clamp(min=0)
    best = [spread / top, -low]
    least = _affine_error(x, *best, top)
    for start in torch.linspace(0.75, 1.1, _STARTS, dtype=torch.float32, device="cpu").tolist():
        scale, minimum = spread * (start / top), -low * start
        for _ in range(_ROUNDS):
            scale, minimum = _fit_affine(x, _affine_codes(x, scale, minimum, top))
        error = _affine_error(x, scale, minimum, top)
        better = error < least
        best = [torch.where(better, new, old) for new, old in zip((scale, minimum), best, strict=True)]
        least = torch.where(better, error, least)
    return best[0], best[1]


def _six_bits(x: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, unit_min: Tensor, top: int):
    """Six-bit scales and minima [B, S, 1] near the real ones, by the error of the decoded sub-block."""
    scale = (scales * _inverse(unit)).round().clamp(0, 63)
    minimum = (minima * _inverse(unit_min)).round().clamp(0, 63)
    best, least = (scale, minimum), torch.full_like(scale, torch.inf)
    for up in (0, -1, 1):
        for shift in (0, -1, 1):
            s, m = (scale + up).clamp(0, 63), (minimum + shift).clamp(0, 63)
            error = _affine_error(x, unit * s, unit_min * m, top)
            better = error < least
            best = (torch.where(better, s, best[0]), torch.where(better, m, best[1]))
            least = torch.where(better, error, least)
    return best[0], best[1], least.sum(1, keepdim=True)


def _fit_units(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of x ≈ d·(scale·codes) - dmin·minimum over whole blocks: two [B, 1, 1]."""
    a = (scale * codes).flatten(1)
    b = minimum.expand_as(codes).flatten(1)
    x = x.flatten(1)
    aa, ab, bb = (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)
    ax, bx = (a * x).sum(1), (b * x).sum(1)
    inverse = _inverse(aa * bb - ab * ab)
    d = torch.where(bb == 0, ax * _inverse(aa), (ax * bb - bx * ab) * inverse)
    dmin = torch.where(bb == 0, torch.zeros_like(d), (ax * ab - bx * aa) * inverse)
    return d.clamp(min=0).view(-1, 1, 1), dmin.clamp(min=0).view(-1, 1, 1)


def _affine_k(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, 256] -> d, dmin (fp16 values in fp32, [B, 1, 1]), scales, minima [B, 8, 1], codes [B, 8, 32]."""
    x = x.view(-1, 8, 32)
    scales, minima = _search_affine(x, top)
    d, dmin = (v.amax(1, keepdim=True) / 63 for v in (scales, minima))
    best = None
    for _ in range(3):
        d, dmin = d.half().float(), dmin.half().float()
        scale, minimum, error = _six_bits(x, scales, minima, d, dmin, top)
        found = (d, dmin, scale, minimum)
        if best is None:
            best, least = found, error
        else:
            better = error < least
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            least = torch.where(better, error, least)
        d, dmin = _fit_units(x, _affine_codes(x, d * scale, dmin * minimum, top), scale, minimum)
    d, dmin, scale, minimum = best
    return d, dmin, scale, minimum, _affine_codes(x, d * scale, dmin * minimum, top)


def _pack_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """Inverse of quants._scales_and_minima: two [B, 8, 1] of six-bit values into 12 bytes."""
    s, m = scale.squeeze(-1).to(torch.uint8), minimum.squeeze(-1).to(torch.uint8)
    return torch.cat(
        [
            s[:, :4] | ((s[:, 4:] >> 4) << 6),
            m[:, :4] | ((m[:, 4:] >> 4) << 6),
            (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
        ],
        1,
    )


def _q4_k(x: Tensor) -> Tensor:
    d, dmin, scale, minimum, codes = _affine_k(x, 15)
    qs = _pack_fields(codes.to(torch.uint8).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([_half_bytes(d[:, 0]), _half_bytes(dmin[:, 0]), _pack_scales(scale, minimum), qs], 1)


def _q5_k(x: Tensor) -> Tensor:
    d, dmin, scale, minimum, codes = _affine_k(x, 31)
    codes = codes.to(torch.uint8)
    qs = _pack_fields((codes & 15).view(-1, 4, 2, 32), 4).flatten(1)
    qh = _pack_fields(codes >> 4, 1)
    return torch.cat([_half_bytes(d[:, 0]), _half_bytes(dmin[:, 0]), _pack_scales(scale, minimum), qh, qs], 1)


# --- Q6_K: weight ≈ d·scale·code, scale of eight bits per 16 weights, code from -32 to 31 -----------------


def _linear_codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x * _inverse(scale)).round_().clamp_(-32, 31)


def _linear_error(x: Tensor, scale: Tensor) -> Tensor:
    return (_linear_codes(x, scale).mul_(scale).sub_(x)).square_().sum(-1, keepdim=True)


def _search_linear(x: Tensor) -> Tensor:
    """The best real-valued scale of each sub-block, of either sign: x [B, S, W] -> [B, S, 1]."""
    where = x.abs().argmax(-1, keepdim=True)
    extreme = x.gather(-1, where)  # takes code -32, the wider end
    best = extreme / -32
    least = _linear_error(x, best)
    for reach in torch.linspace(29.0, 36.0, _STARTS, dtype=torch.float32, device="cpu").tolist():
        scale = extreme / -reach
        for _ in range(_ROUNDS):
            codes = _linear_codes(x, scale)
            scale = (codes * x).sum(-1, keepdim=True) * _inverse((codes * codes).sum(-1, keepdim=True))
        error = _linear_error(x, scale)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _eight_bits(x: Tensor, scales: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit scales [B, S, 1] near the real ones, by the error of the decoded sub-block; that error."""
    middle = (scales * _inverse(unit)).round().clamp(-128, 127)
    best, least = middle, torch.full_like(middle, torch.inf)
    for up in (0, -1, 1):
        scale = (middle + up).clamp(-128, 127)
        error = _linear_error(x, unit * scale)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best, least.sum(1, keepdim=True)


def _q6_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    scales = _search_linear(x)
    widest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d, best = widest / -128, None
    for _ in range(2):
        d = d.half().float()
        scale, error = _eight_bits(x, scales, d)
        if best is None:
            best, least = (d, scale), error
        else:
            better = error < least
            best = (torch.where(better, d, best[0]), torch.where(better, scale, best[1]))
            least = torch.where(better, error, least)
        a = scale * _linear_codes(x, d * scale)
        d = (a * x).sum((1, 2), keepdim=True) * _inverse((a * a).sum((1, 2), keepdim=True))
    d, scale = best
    codes = (_linear_codes(x, d * scale) + 32).to(torch.uint8).view(-1, 2, 128)
    ql = _pack_fields((codes & 15).view(-1, 2, 2, 64), 4).flatten(1)
    qh = _pack_fields((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([ql, qh, scale.squeeze(-1).to(torch.int8).view(torch.uint8), _half_bytes(d[:, 0])], 1)


_ENCODERS = {"Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
