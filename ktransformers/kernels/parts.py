"""Published formats taken apart: the codes, scales and minima of a few rows as torch tensors of their own.

quants/ turns a format into numbers; this turns it into the integers that the numbers are made of, which the GPU keeps.
Letters: B blocks, N rows, K columns, G groups of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktransformers.quants import blocks as b
from ktransformers.quants.scaled import SCALE_TYPES, ScaledWeight, _dense


@dataclass(frozen=True)
class Parts:
    """codes uint8 [N, K] · scales [N, G] · minima [N, G] or None · d, dmin fp16 [N, K/256] or None.

    Of one block of a GGUF type a line each: codes [B, block] and so on.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None


# --- GGUF: uint8 [B, nbytes] -> Parts, a line a block ---------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16)


def _low_nibbles_first(packed: Tensor, group: int) -> Tensor:
    """Bytes [B, n], of which each run of `group / 2` holds `group` codes, the low nibbles before the high ones."""
    return b._fields(packed.reshape(len(packed), -1, group // 2), 4).reshape(len(packed), -1)


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_low_nibbles_first(blocks[:, 2:], 32), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return Parts(_low_nibbles_first(blocks[:, 4:], 32), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Parts:
    return Parts(_low_nibbles_first(blocks[:, 6:], 32) | b._fifth_bits(blocks[:, 2:6]), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    codes = _low_nibbles_first(blocks[:, 8:], 32) | b._fifth_bits(blocks[:, 4:8])
    return Parts(codes, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[:, 2:] ^ 0x80, _half(blocks, 0))


def _two_bits(packed: Tensor) -> Tensor:
    """The 64 bytes of Q2_K's and Q3_K's codes: 32 bytes hold four sub-blocks of 32, low bits first."""
    return b._fields(packed.reshape(len(packed), 2, 32), 2).reshape(len(packed), 256)


def _q2_k(blocks: Tensor) -> Parts:
    return Parts(_two_bits(blocks[:, 16:80]), blocks[:, :16], None, _half(blocks, 80), _half(blocks, 82))


def _q3_k(blocks: Tensor) -> Parts:
    low = b._fields(blocks[:, 96:104], 4).reshape(-1, 16)
    high = b._fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scales = (low | (high << 4)).to(torch.int8) - 32
    codes = _two_bits(blocks[:, 32:96]) | (b._fields(blocks[:, :32], 1).reshape(-1, 256) << 2)
    return Parts(codes, scales, d=_half(blocks, 108))


def _q4_k(blocks: Tensor) -> Parts:
    scales, minima = b._scales_and_minima(blocks[:, 4:16])
    return Parts(_low_nibbles_first(blocks[:, 16:], 64), scales, minima, _half(blocks, 0), _half(blocks, 2))


def _q5_k(blocks: Tensor) -> Parts:
    scales, minima = b._scales_and_minima(blocks[:, 4:16])
    codes = _low_nibbles_first(blocks[:, 48:], 64) | (b._fields(blocks[:, 16:48], 1).reshape(-1, 256) << 4)
    return Parts(codes, scales, minima, _half(blocks, 0), _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Parts:
    high = b._fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = _low_nibbles_first(blocks[:, :128], 128) | (high << 4)
    return Parts(codes, blocks[:, 192:208].clone().view(torch.int8), d=_half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Parts:
    low = b._fields(blocks[:, 4:8], 4).transpose(-1, -2).reshape(-1, 8)
    high = b._fields(blocks[:, 2:4], 2).transpose(-1, -2).reshape(-1, 8)
    scales = (low | (high << 4)).to(torch.int8) - 32
    return Parts(_low_nibbles_first(blocks[:, 8:], 32), scales, d=_half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Parts:
    return Parts(_low_nibbles_first(blocks[:, 1:], 32), blocks[:, :1])


_BLOCKS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _q4_0, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip


def of_blocks(weight: b.Packed, device: torch.device) -> Parts:
    """The parts of a matrix in a GGUF type, made on `device`."""
    rows = weight.shape[0]
    parts = _BLOCKS[weight.type.name](weight.data.view(-1, weight.type.nbytes).to(device))
    return Parts(*(None if part is None else part.reshape(rows, -1) for part in vars(parts).values()))


# --- scales apart from their codes ----------------------------------------------------------------------------------


def of_scaled(weight: ScaledWeight, device: torch.device) -> Parts:
    """The parts of a matrix whose scales lie apart; columns in the file's order, minima are zero points as stored."""
    data, kind = _dense(weight.data, device), weight.type
    if kind.name == "I8":
        codes = data ^ 0x80
    elif kind.name == "F8_E4M3":
        codes = data
    elif kind.name == "F4_E2M1":
        codes = b._fields(data, 4).transpose(-1, -2).flatten(-2)
    else:
        codes = kind.unpack(data).to(torch.uint8)
    zeros = None if weight.zeros is None else (weight._zero_values(device) - weight.zero_bias).to(torch.uint8)
    return Parts(codes, _scales(weight, device), zeros)


def _scales(weight: ScaledWeight, device: torch.device) -> Tensor:
    """[N, G] in the layout's type: E4M3 as the fp16 that it is, anything with a global scale as fp32."""
    scales = _dense(weight.scales, device)
    if weight.scale_type != "E8M0":
        scales = scales.view(SCALE_TYPES[weight.scale_type])
    if weight.scale_type == "E4M3":
        scales = scales.to(torch.float16)
    if weight.global_scale != 1.0:
        scales = scales.float() * weight.global_scale
    if weight.type.layout != "rows":
        return scales.T
    rows = weight.shape[0]
    return scales.repeat_interleave(min(weight.scale_rows, rows), 0)[:rows] if len(scales) < rows else scales
