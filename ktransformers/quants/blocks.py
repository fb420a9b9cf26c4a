"""Every packed weight format: its block, its bytes, and how to turn it back into numbers in torch.

This is the readable reference of the formats: the C kernels and the tests are held to it, and it is held,
bit for bit in fp32, to the `gguf` package. It knows blocks and bytes; it knows nothing about files or names.

A row of a packed matrix is a run of blocks; a block holds `block` weights in `nbytes` bytes, little endian.
Letters in shapes below: B blocks in a call.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean
from ktransformers.quants.iq_grids import GRIDS

WEIGHTS_AT_ONCE = 1 << 21
"""Weights dequantized at a time: bounds the temporaries to some tens of MiB whatever the tensor's size."""


@dataclass(frozen=True)
class QuantType:
    """One storage format. `id` is the GGUF type id, -1 for a format that only safetensors has.

    `unpack` maps uint8 [B, nbytes] to float32 [B, block]; `torch_dtype` is set for plain numbers instead.
    A type with neither is known by name and size only. `in_c`: the C library computes it, a row of its traits.c.
    """

    name: str
    id: int
    block: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor] | None = None
    torch_dtype: torch.dtype | None = None
    in_c: bool = False

    @property
    def computed(self) -> bool:
        """Whether this version can turn the type into numbers."""
        return self.unpack is not None or self.torch_dtype is not None

    @property
    def dequantize(self) -> Callable[[Tensor], Tensor] | None:
        """uint8 [B, nbytes] -> float32 [B, block], or None when this version does not compute the type."""
        if self.torch_dtype is not None:
            return lambda blocks: blocks.contiguous().view(-1).view(self.torch_dtype).float().view(-1, self.block)
        return self.unpack

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights. Raises WeightError when it is not a whole number of blocks."""
        if columns % self.block:
            raise WeightError(
                f"A row of {columns} weights is not a whole number of {self.name} blocks of {self.block}."
            )
        return columns // self.block * self.nbytes

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (torch order; the last dimension is the packed one)."""
        if not shape:
            return self.row_bytes(self.block)
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    def __repr__(self) -> str:
        return f"QuantType({self.name})"


# --- unpacking, format by format --------------------------------------------------------------------------
# Every product and sum is one torch operation, so it rounds once, as the gguf package does: never fuse them.


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as float32 [B, 1]. The copy makes any address aligned."""
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Split bytes [..., n] into their bit fields, low bits first: uint8 [..., 8/bits, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)


def _fifth_bits(qh: Tensor) -> Tensor:
    """The 32 bits of uint8 [B, 4] in weight order, each moved to value 16: uint8 [B, 32]."""
    return _fields(qh, 1).transpose(-1, -2).reshape(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 2:], 4).reshape(-1, 32).to(torch.int8) - 8
    return _half(blocks, 0) * q.float()


def _q4_1(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 4:], 4).reshape(-1, 32)
    return _half(blocks, 0) * q.float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 6:], 4).reshape(-1, 32) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (q.to(torch.int8) - 16).float()


def _q5_1(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 8:], 4).reshape(-1, 32) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].clone().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    # scales[16] (low nibble scale, high nibble minimum) · qs[64] · d · dmin
    scales = blocks[:, :16]
    q = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    scale = _half(blocks, 80) * (scales & 15).float()
    minimum = _half(blocks, 82) * (scales >> 4).float()
    return (scale.unsqueeze(-1) * q - minimum.unsqueeze(-1)).reshape(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    # hmask[32] · qs[64] · scales[12]: 16 six-bit scales, low nibbles in bytes 0-7, high bits in 8-11 · d
    low = _fields(blocks[:, 96:104], 4).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scale = _half(blocks, 108) * ((low | (high << 4)).to(torch.int8) - 32).float()
    q = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256).to(torch.int8)
    # A set bit of hmask means "do not subtract 4".
    q = q - ((_fields(blocks[:, :32], 1).reshape(-1, 256) ^ 1) << 2).to(torch.int8)
    return (scale.unsqueeze(-1) * q.view(-1, 16, 16).float()).reshape(-1, 256)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K as eight six-bit scales and eight six-bit minima, uint8 [B, 8] each.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, bytes 8-11 the low nibbles of scales (low) and minima
    (high) 4-7, whose top two bits sit in the top two bits of bytes 0-3 and 4-7.
    """
    scale, minimum, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([scale & 63, (both & 15) | ((scale >> 2) & 48)], 1)
    minima = torch.cat([minimum & 63, (both >> 4) | ((minimum >> 2) & 48)], 1)
    return scales, minima


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """d·scale·q - dmin·minimum for Q4_K and Q5_K; `q` is uint8 [B, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.float()).unsqueeze(-1)
    minimum = (_half(blocks, 2) * minima.float()).unsqueeze(-1)
    return (scale * q.float() - minimum).reshape(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    # d · dmin · scales[12] · qs[128]: 32 bytes hold two sub-blocks of 32, low nibbles first
    return _scaled(blocks, _fields(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    # d · dmin · scales[12] · qh[32]: bit j of byte i is the fifth bit of weight i in sub-block j · qs[128]
    q = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _scaled(blocks, q | (_fields(blocks[:, 16:48], 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    # ql[128] · qh[64] · sixteen int8 scales · d
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = ((low | (high << 4)).to(torch.int8) - 32).view(-1, 16, 16).float()
    scale = _half(blocks, 208) * blocks[:, 192:208].clone().view(torch.int8).float()
    return (scale.unsqueeze(-1) * q).reshape(-1, 256)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _look_up(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _look_up(_IQ4_VALUES, _fields(blocks[:, 2:], 4).reshape(-1, 32))


def _iq4_xs(blocks: Tensor) -> Tensor:
    # d · scales_h[2]: eight two-bit fields · scales_l[4]: eight nibbles · qs[128]
    low = _fields(blocks[:, 4:8], 4).transpose(-1, -2).reshape(-1, 8)
    high = _fields(blocks[:, 2:4], 2).transpose(-1, -2).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | (high << 4)).to(torch.int8) - 32).float()
    q = _look_up(_IQ4_VALUES, _fields(blocks[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 8, 32))
    return (scale.unsqueeze(-1) * q).reshape(-1, 256)


def _mxfp4(blocks: Tensor) -> Tensor:
    # One power of two per 32 weights (halved, as the table is doubled); codes 0 and 1 are fp32 subnormals.
    e = blocks[:, :1].int()
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
    return bits.view(torch.float32) * _look_up(_FP4_DOUBLED, _fields(blocks[:, 1:], 4).reshape(-1, 32))


def _nvfp4(blocks: Tensor) -> Tensor:
    # Four scales, e4m3 without its sign (0x7f, a NaN there, is zero), halved as the table is doubled · qs[32]
    x = blocks[:, :4].int()
    exponent, mantissa = (x >> 3) & 15, (x & 7).float()
    power = ((exponent + 127 - 8) << 23).view(torch.float32)
    scale = torch.where(exponent == 0, mantissa * 2**-10, (mantissa / 8 + 1) * power).masked_fill(x == 127, 0.0)
    q = _look_up(_FP4_DOUBLED, _fields(blocks[:, 4:].reshape(-1, 4, 8), 4).reshape(-1, 4, 16))
    return (scale.unsqueeze(-1) * q).reshape(-1, 64)


def _tq1_0(blocks: Tensor) -> Tensor:
    # qs[48] · qh[4] · d. A byte is a fraction in base 3: multiplied by 3^n modulo 256, its next digit is on top.
    def digits(packed: Tensor, count: int) -> Tensor:
        power = torch.tensor([3**n for n in range(count)], dtype=torch.uint8, device=packed.device)
        rest = packed.unsqueeze(-2) * power.unsqueeze(-1)
        return ((rest.int() * 3) >> 8).reshape(len(packed), -1)

    q = torch.cat([digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)], 1)
    return _half(blocks, 52) * (q - 1).float()


def _tq2_0(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 256).to(torch.int8) - 1
    return _half(blocks, 64) * q.float()


# The IQ types: `index` chooses points of a grid (8 or 4 values each), other bits give their signs.


@cache
def _grid(name: str) -> Tensor:
    return GRIDS[name].values()


def _points(name: str, index: Tensor) -> Tensor:
    """Integers [B, n] -> the grid points' values, float32 [B, n * digits]."""
    return _grid(name).to(index.device)[index.long()].reshape(len(index), -1)


def _words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [B, n] as little-endian unsigned numbers of a signed dtype's size: int64 [B, n / size]."""
    words = packed.clone(memory_format=torch.contiguous_format).view(dtype).long()
    return words & ((1 << 8 * dtype.itemsize) - 1)


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes [B, n] as their halves, low ones first: uint8 [B, 2 * n]."""
    return _fields(packed, 4).transpose(-1, -2).reshape(len(packed), -1)


def _signs(bits: Tensor) -> Tensor:
    """uint8 [B, n] -> +1 where a bit is clear and -1 where it is set, low bits first: float32 [B, 8 * n]."""
    return 1 - 2 * _fields(bits, 1).transpose(-1, -2).reshape(len(bits), -1).float()


def _even_signs(bits: Tensor) -> Tensor:
    """As `_signs` for integers of 7 bits: the eighth makes the number of minus signs even."""
    parity = bits
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return _signs((bits | ((parity & 1) << 7)).to(torch.uint8))


def _grouped(scale: Tensor, values: Tensor) -> Tensor:
    """Multiply float [B, groups] into [B, 256]."""
    return (scale.unsqueeze(-1) * values.view(len(scale), scale.shape[1], -1)).reshape(len(scale), -1)


def _signs_and_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 32 bits a group of IQ2_XXS and IQ3_XXS, [B, 32] bytes: signs [B, 256], and scale + 1/2 float32 [B, 8]."""
    words = _words(packed, torch.int32)
    signs = (words.unsqueeze(-1) >> torch.arange(0, 28, 7, device=packed.device)) & 127
    return _even_signs(signs.reshape(len(packed), -1)), (words >> 28).float() + 0.5


def _iq2_xxs(blocks: Tensor) -> Tensor:
    # d · a group of 32: four indices, then 32 bits with four times 7 bits of signs and a scale
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    signs, scale = _signs_and_scales(groups[:, :, 4:].reshape(-1, 32))
    values = _points("IQ2_XXS", groups[:, :, :4].reshape(-1, 32))
    return _grouped(_half(blocks, 0) * scale * 0.25, values) * signs


def _iq2_xs(blocks: Tensor) -> Tensor:
    # d · 32 words of 9 bits index and 7 bits signs · scales[8]: nibbles, one per 16 weights
    words = _words(blocks[:, 2:66], torch.int16)
    scale = _half(blocks, 0) * (_nibbles(blocks[:, 66:]).float() + 0.5) * 0.25
    return _grouped(scale, _points("IQ2_XS", words & 511)) * _even_signs(words >> 9)


def _iq2_s(blocks: Tensor) -> Tensor:
    # d · qs[32] · signs[32] · qh[8]: bits 8 and 9 of four indices a byte · scales[8]
    high = _fields(blocks[:, 66:74], 2).transpose(-1, -2).reshape(-1, 32).int()
    scale = _half(blocks, 0) * (_nibbles(blocks[:, 74:]).float() + 0.5) * 0.25
    return _grouped(scale, _points("IQ2_S", blocks[:, 2:34] | (high << 8))) * _signs(blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor) -> Tensor:
    # d · qs[64]: an index per four weights · eight times 32 bits, as in IQ2_XXS
    signs, scale = _signs_and_scales(blocks[:, 66:])
    return _grouped(_half(blocks, 0) * scale * 0.5, _points("IQ3_XXS", blocks[:, 2:66])) * signs


def _iq3_s(blocks: Tensor) -> Tensor:
    # d · qs[64] · qh[8]: bit 8 of eight indices a byte · signs[32] · scales[4]: nibbles, one per 32 weights
    high = _fields(blocks[:, 66:74], 1).transpose(-1, -2).reshape(-1, 64).int()
    scale = _half(blocks, 0) * (2 * _nibbles(blocks[:, 106:]).int() + 1).float()
    return _grouped(scale, _points("IQ3_S", blocks[:, 2:66] | (high << 8))) * _signs(blocks[:, 74:106])


def _iq1_s(blocks: Tensor) -> Tensor:
    # d · qs[32] · a word per 32 weights: bits 8 to 10 of four indices, a scale of 3 bits, the sign of the shift by 1/8
    words = _words(blocks[:, 34:], torch.int16)
    high = (words.unsqueeze(-1) >> torch.arange(0, 12, 3, device=blocks.device)) & 7
    shift = 0.125 - 0.25 * (words >> 15).float()
    values = _points("IQ1", blocks[:, 2:34] | (high.reshape(-1, 32) << 8)).view(-1, 8, 32) + shift.unsqueeze(-1)
    return _grouped(_half(blocks, 0) * (2 * ((words >> 12) & 7) + 1).float(), values)


def _iq1_m(blocks: Tensor) -> Tensor:
    # qs[32] · qh[16]: a nibble per eight weights, bits 8 to 10 of the index and the sign of the shift · four words,
    # each four scales of 3 bits (one per 16 weights) and a nibble of d, low nibble first
    words = _words(blocks[:, 48:], torch.int16)
    d = ((words >> 12) << torch.arange(0, 16, 4, device=blocks.device)).sum(-1, keepdim=True)
    d = torch.where(d < 1 << 15, d, d - (1 << 16)).to(torch.int16).view(torch.float16).float()
    scale = (words.unsqueeze(-1) >> torch.arange(0, 12, 3, device=blocks.device)) & 7
    high = _nibbles(blocks[:, 32:48]).int()
    shift = 0.125 - 0.25 * (high >> 3).float()
    values = _points("IQ1", blocks[:, :32] | ((high & 7) << 8)).view(-1, 32, 8) + shift.unsqueeze(-1)
    return _grouped(d * (2 * scale.reshape(-1, 16) + 1).float(), values)


_TABLE = (
    QuantType("F32", 0, 1, 4, torch_dtype=torch.float32, in_c=True),
    QuantType("F16", 1, 1, 2, torch_dtype=torch.float16, in_c=True),
    QuantType("Q4_0", 2, 32, 18, _q4_0, in_c=True),
    QuantType("Q4_1", 3, 32, 20, _q4_1, in_c=True),
    QuantType("Q5_0", 6, 32, 22, _q5_0, in_c=True),
    QuantType("Q5_1", 7, 32, 24, _q5_1, in_c=True),
    QuantType("Q8_0", 8, 32, 34, _q8_0, in_c=True),
    QuantType("Q8_1", 9, 32, 40),
    QuantType("Q2_K", 10, 256, 84, _q2_k, in_c=True),
    QuantType("Q3_K", 11, 256, 110, _q3_k, in_c=True),
    QuantType("Q4_K", 12, 256, 144, _q4_k, in_c=True),
    QuantType("Q5_K", 13, 256, 176, _q5_k, in_c=True),
    QuantType("Q6_K", 14, 256, 210, _q6_k, in_c=True),
    QuantType("Q8_K", 15, 256, 292),
    QuantType("IQ2_XXS", 16, 256, 66, _iq2_xxs, in_c=True),
    QuantType("IQ2_XS", 17, 256, 74, _iq2_xs, in_c=True),
    QuantType("IQ3_XXS", 18, 256, 98, _iq3_xxs, in_c=True),
    QuantType("IQ1_S", 19, 256, 50, _iq1_s, in_c=True),
    QuantType("IQ4_NL", 20, 32, 18, _iq4_nl, in_c=True),
    QuantType("IQ3_S", 21, 256, 110, _iq3_s, in_c=True),
    QuantType("IQ2_S", 22, 256, 82, _iq2_s, in_c=True),
    QuantType("IQ4_XS", 23, 256, 136, _iq4_xs, in_c=True),
    QuantType("I8", 24, 1, 1),
    QuantType("I16", 25, 1, 2),
    QuantType("I32", 26, 1, 4),
    QuantType("I64", 27, 1, 8),
    QuantType("F64", 28, 1, 8),
    QuantType("IQ1_M", 29, 256, 56, _iq1_m, in_c=True),
    QuantType("BF16", 30, 1, 2, torch_dtype=torch.bfloat16, in_c=True),
    QuantType("TQ1_0", 34, 256, 54, _tq1_0, in_c=True),
    QuantType("TQ2_0", 35, 256, 66, _tq2_0, in_c=True),
    QuantType("MXFP4", 39, 32, 17, _mxfp4, in_c=True),
    QuantType("NVFP4", 40, 64, 36, _nvfp4, in_c=True),
    QuantType("Q1_0", 41, 128, 18),
)

QUANT_TYPES: dict[str, QuantType] = {kind.name: kind for kind in _TABLE}
BY_ID: dict[int, QuantType] = {kind.id: kind for kind in _TABLE}

REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
           36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}  # fmt: skip
"""GGUF ids that once named a type and are withdrawn; their sizes are nobody's business any more."""


def quant_type(name: str | QuantType) -> QuantType:
    """The type called `name`. Raises UnsupportedError with the closest known name."""
    if isinstance(name, QuantType):
        return name
    if name not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise UnsupportedError(f"Unknown weight type {name!r}{did_you_mean(name, QUANT_TYPES)}. Known: {known}.")
    return QUANT_TYPES[name]


def computed_types() -> list[str]:
    """Names of the types this version turns into numbers."""
    return [kind.name for kind in _TABLE if kind.computed]


def _require_computed(kind: QuantType) -> None:
    if not kind.computed:
        raise UnsupportedError(
            f"Weights of type {kind.name} are not computed by this version (it computes "
            f"{', '.join(computed_types())}). Use a checkpoint in one of those types."
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight tensor in its published bytes: `data` uint8 [nbytes] on the CPU, a view of a mapped file.

    `shape` is in torch order and its last dimension is the packed one. `data` may start at any address.
    Raises WeightError at construction when bytes and shape do not agree.
    """

    data: Tensor
    type: QuantType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        expected = self.type.packed_bytes(self.shape)
        ok = self.data.dtype == torch.uint8 and self.data.dim() == 1 and self.data.is_contiguous()
        if not ok or self.data.numel() != expected or self.data.device.type != "cpu":
            raise WeightError(
                f"Packed {self.type.name} {list(self.shape)} needs {expected} contiguous uint8 on the "
                f"CPU, got {self.data.dtype} {list(self.data.shape)} on {self.data.device}."
            )

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one run along the last dimension."""
        return self.type.packed_bytes(self.shape[-1:])

    def rows(self, start: int, stop: int) -> "Packed":
        """Rows `start` to `stop` of a 2-D tensor, without a copy."""
        self._check_slice(2, start, stop)
        size = self.row_bytes
        return Packed(self.data[start * size : stop * size], self.type, (stop - start, self.shape[1]))

    def expert(self, e: int) -> "Packed":
        """Matrix `e` of a 3-D tensor [E, rows, columns], without a copy."""
        self._check_slice(3, e, e + 1)
        size = self.shape[1] * self.row_bytes
        return Packed(self.data[e * size : (e + 1) * size], self.type, self.shape[1:])

    def _check_slice(self, dims: int, start: int, stop: int) -> None:
        if len(self.shape) != dims:
            raise WeightError(f"A {dims}-D slice of packed {self.type.name} {list(self.shape)}, which is not {dims}-D.")
        if not 0 <= start <= stop <= self.shape[0]:
            raise WeightError(
                f"Slice {start}:{stop} of packed {self.type.name} {list(self.shape)}: it has {self.shape[0]}."
            )

    def dequantize(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The numbers, in memory of their own. Peak memory: the result and a few `WEIGHTS_AT_ONCE`.

        Raises UnsupportedError for a type that this version does not compute.
        """
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """As `dequantize`, into contiguous `out` of the same shape, any float dtype, any device."""
        _require_computed(self.type)
        if tuple(out.shape) != tuple(self.shape) or not out.is_contiguous():
            raise WeightError(
                f"Cannot dequantize {list(self.shape)} into {list(out.shape)}; expected contiguous memory "
                "of the same shape."
            )
        kind, flat, step = self.type, out.view(-1), max(1, WEIGHTS_AT_ONCE // self.type.block)
        blocks = self.data.view(-1, kind.nbytes)
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step]
            target = flat[start * kind.block : (start + len(piece)) * kind.block].view(-1, kind.block)
            if kind.torch_dtype is not None:
                # Copied first: a view of another dtype at an odd address would be undefined behaviour in C++.
                target.copy_(piece.clone().view(-1).view(kind.torch_dtype).view(-1, 1))
            else:
                target.copy_(kind.unpack(piece.to(out.device)))


def dequantize(
    data: Tensor, type: QuantType | str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn uint8 bytes (any shape, contiguous, CPU) of `type` into a tensor of `shape`.

    In fp32 the result equals `gguf.dequantize` bit for bit. Raises WeightError when sizes do not agree and
    UnsupportedError for a type that this version does not compute.
    """
    return Packed(data.reshape(-1), quant_type(type), tuple(shape)).dequantize(dtype)
