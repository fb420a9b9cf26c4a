"""Weights whose scales are stored apart from their codes, as safetensors have them: FP8, FP4, INT8, INT4, GPTQ, AWQ.

What quants.py is for blocks that carry their scales: the formats' readable reference, to which the C kernels and
the tests are held. It knows bytes, shapes and numbers; it knows nothing about files, names or configs
(loaders/schemes.py does). Nothing here copies a weight: slices are views.

A weight [N, K] is `(code - zero) * scale * global_scale`. Its codes lie in lines of bytes: a line is a row for most
types; GPTQ and AWQ pack along K, so that a line is a few columns of all rows.
Letters: N rows, K columns, G groups of columns that share scales, E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.quants.blocks import QUANT_TYPES, WEIGHTS_AT_ONCE

SCALE_TYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "E8M0": torch.float8_e8m0fnu,  # a power of two, the exponent biased by 127
    "E4M3": torch.float8_e4m3fn,
}
"""Stored types of scales."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight columns each nibble of an AWQ word holds, lowest nibble first."""

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class ScaledType:
    """One kind of codes. `id` is the C library's, beyond those of GGUF.

    `layout`: "rows" (a line is a row), "gptq" (a line is the columns of one 32-bit word, for all rows) or "awq" (a
    line is one column, eight rows to a word). `zero` is what a code of value 0 is stored as.
    `unpack` maps contiguous uint8 [lines, bytes] to the codes as stored, float32 [N, K]. `in_c`: the C library
    computes it, a row of its traits.c.
    """

    name: str
    id: int
    bits: int
    layout: str
    zero: int
    unpack: Callable[[Tensor], Tensor]
    in_c: bool = False

    computed = True
    torch_dtype = None

    @property
    def per_word(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    def lines(self, rows: int, columns: int) -> tuple[int, int]:
        """(lines, bytes of a line) of a weight [rows, columns]. Raises WeightError when these are no whole words."""
        along = rows if self.layout == "awq" else columns
        unit = self.per_word if self.layout != "rows" else 8 // self.bits
        if along % unit:
            what = "rows" if self.layout == "awq" else "columns"
            raise WeightError(f"{along} {what} of {self.name} are no multiple of {unit}, which is what one unit holds.")
        if self.layout == "gptq":
            return columns // unit, rows * 4
        return (columns, rows // unit * 4) if self.layout == "awq" else (rows, columns // unit)

    def __repr__(self) -> str:
        return f"ScaledType({self.name})"


# --- codes, type by type ---------------------------------------------------------------------------------------------


def _nibbles(data: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2n], the low nibble of a byte first."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def _f8_e4m3(data: Tensor) -> Tensor:
    return data.view(torch.float8_e4m3fn).float()


def _f4_e2m1(data: Tensor) -> Tensor:
    return torch.tensor(_FP4_VALUES, dtype=torch.float32, device=data.device)[_nibbles(data).int()]


def _i8(data: Tensor) -> Tensor:
    return data.view(torch.int8).float()


def _u8(data: Tensor) -> Tensor:
    return data.float()


def _i4(data: Tensor) -> Tensor:
    return _nibbles(data).float()


def _gptq(data: Tensor, bits: int) -> Tensor:
    words = data.unflatten(-1, (-1, 4))  # [K/per_word, N, 4], little endian
    codes = _nibbles(words) if bits == 4 else words
    return codes.permute(1, 0, 2).flatten(1).float()


def _awq4(data: Tensor) -> Tensor:
    stored = _nibbles(data.unflatten(-1, (-1, 4)))  # [K, N/8, 8]
    codes = torch.empty_like(stored)
    codes[..., list(_AWQ_ORDER)] = stored
    return codes.flatten(1).T.float()


F8_E4M3 = ScaledType("F8_E4M3", 1000, 8, "rows", 0, _f8_e4m3, in_c=True)
F4_E2M1 = ScaledType("F4_E2M1", 1001, 4, "rows", 0, _f4_e2m1, in_c=True)
I8 = ScaledType("I8", 1002, 8, "rows", 0, _i8, in_c=True)
I4 = ScaledType("I4", 1003, 4, "rows", 8, _i4, in_c=True)
GPTQ4 = ScaledType("GPTQ4", 1004, 4, "gptq", 8, lambda data: _gptq(data, 4), in_c=True)
GPTQ8 = ScaledType("GPTQ8", 1005, 8, "gptq", 128, lambda data: _gptq(data, 8), in_c=True)
AWQ4 = ScaledType("AWQ4", 1006, 4, "awq", 8, _awq4, in_c=True)
U8 = ScaledType("U8", 1007, 8, "rows", 128, _u8, in_c=True)

SCALED_TYPES: dict[str, ScaledType] = {t.name: t for t in (F8_E4M3, F4_E2M1, I8, I4, GPTQ4, GPTQ8, AWQ4, U8)}
"""F8_E4M3, F4_E2M1: floats of 8 and 4 bits, two of the latter a byte, low nibble first. I8: two's complement. I4, U8:
offset binary, code - 8 (two a byte) and code - 128. GPTQ4, GPTQ8, AWQ4: the 32-bit words of those files."""

BLOCKS_IN_C = frozenset(name for name, kind in QUANT_TYPES.items() if kind.in_c)
SCALED_IN_C = frozenset(name for name, kind in SCALED_TYPES.items() if kind.in_c)
"""What the C library computes, by the tables here, so also where it is not built."""


# --- a weight --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScaledWeight:
    """A weight [N, K], or E of them, in its published bytes; used like `quants.Packed`.

    data: uint8 [(E,) lines, bytes] on the CPU, a view of a mapped file; bytes of a line are contiguous, lines need
        not be.
    scales: uint8 [(E,) scale lines, bytes] of `scale_type`. Element (r, c) of a type with rows for lines uses scale
        [r // scale_rows, c // scale_cols]; blocks at the edges may be partial, and a block may exceed the weight. Of
        GPTQ and AWQ, scales are [G, N], and column c uses line c // scale_cols, or `order[c]`.
    zeros: what codes of value 0 are stored as, less `zero_bias`, or None where that is the type's `zero` throughout.
        GPTQ, AWQ: uint8 [(E,) G, bytes], packed along N as the codes of AWQ are along N and of GPTQ along K. I4, U8:
        uint8 [(E,) ceil(N / per_word), 4 G]: words of 32 bits, packed along N.
    order: int32 [K], the group of each column, or None where it is c // scale_cols.

    Raises WeightError at construction when bytes and shapes do not agree, so that C may trust them.
    """

    type: ScaledType
    shape: tuple[int, ...]
    data: Tensor
    scales: Tensor
    scale_type: str
    scale_rows: int
    scale_cols: int
    zeros: Tensor | None = None
    zero_bias: int = 0
    order: Tensor | None = None
    global_scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or not all(n > 0 for n in self.shape):
            raise WeightError(f"{self}: expected a shape [N, K] or [E, N, K] of sizes from 1 on.")
        if self.scale_type not in SCALE_TYPES:
            raise WeightError(f"{self}: scales of {self.scale_type}, expected one of {', '.join(SCALE_TYPES)}.")
        if self.scale_rows < 1 or self.scale_cols < 1:
            raise WeightError(f"{self}: blocks of {self.scale_rows}x{self.scale_cols}, expected sizes from 1 on.")
        self._check_part("data", self.data, self.type.lines(*self.shape[-2:]))
        self._check_part("scales", self.scales, self._scale_lines())
        if self.zeros is not None:
            self._check_part("zeros", self.zeros, self._zero_lines())
        if self.order is not None:
            self._check_order(self.order)

    def _check_part(self, name: str, part: Tensor, expected: tuple[int, int]) -> None:
        wanted = [*self.shape[:-2], *expected]
        ok = part.dtype == torch.uint8 and part.device.type == "cpu" and list(part.shape) == wanted
        if not ok or (expected[1] > 1 and part.stride(-1) != 1):
            raise WeightError(
                f"{self}: {name} are {part.dtype} {list(part.shape)} on {part.device}, expected uint8 {wanted} on the "
                "CPU, contiguous in each line."
            )

    def _check_order(self, order: Tensor) -> None:
        groups = self.scales.shape[-2] if self._groups_are_lines else self._group_count
        ok = order.dtype == torch.int32 and list(order.shape) == [self.shape[-1]] and order.is_contiguous()
        if not ok or order.data_ptr() % 4 or len(self.shape) != 2:
            raise WeightError(f"{self}: order is {order.dtype} {list(order.shape)}, expected int32 [K] of a matrix.")
        low, high = order.aminmax()
        if low < 0 or high >= groups:
            raise WeightError(f"{self}: order has groups {low} to {high}, expected 0 to {groups - 1}.")

    @property
    def _groups_are_lines(self) -> bool:
        """Whether scales are [G, N], as GPTQ and AWQ have them, and not [.., G]."""
        return self.type.layout != "rows"

    @property
    def _scale_size(self) -> int:
        return SCALE_TYPES[self.scale_type].itemsize

    @property
    def _group_count(self) -> int:
        return math.ceil(self.shape[-1] / self.scale_cols)

    def _scale_lines(self) -> tuple[int, int]:
        rows, size = self.shape[-2], self._scale_size
        if not self._groups_are_lines:
            return math.ceil(rows / self.scale_rows), self._group_count * size
        return (self.scales.shape[-2] if self.order is not None else self._group_count), rows * size

    def _zero_lines(self) -> tuple[int, int]:
        rows, per_word = self.shape[-2], self.type.per_word
        if self._groups_are_lines:
            if rows % per_word:
                raise WeightError(f"{self}: {rows} rows, expected a multiple of {per_word}, as zeros are packed.")
            return self.scales.shape[-2], rows // per_word * 4
        if self.type.zero == 0 or self.scale_rows != 1:
            raise WeightError(f"{self}: zeros for {self.type.name} in blocks of {self.scale_rows} rows.")
        return math.ceil(rows / per_word), self._group_count * 4

    def __str__(self) -> str:
        return f"{self.type.name} {list(self.shape)}"

    # --- for C: pointers are data_ptr() of data, scales, zeros and order ---

    @property
    def stride(self) -> int:
        """Bytes from a line of codes to the next."""
        return _pitch(self.data)

    @property
    def span(self) -> int:
        """Bytes from the first of a matrix's codes to after the last."""
        return _span(self.data)

    @property
    def scale_stride(self) -> int:
        return _pitch(self.scales)

    @property
    def scale_span(self) -> int:
        return _span(self.scales)

    @property
    def zero_stride(self) -> int:
        """As `stride`; 0 without zeros."""
        return 0 if self.zeros is None else _pitch(self.zeros)

    @property
    def zero_span(self) -> int:
        return 0 if self.zeros is None else _span(self.zeros)

    # --- as Packed ---

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and order."""
        parts = (self.data, self.scales, self.zeros, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def expert(self, e: int) -> "ScaledWeight":
        """Matrix `e` of a 3-D weight, without a copy."""
        if len(self.shape) != 3:
            raise WeightError(f"A 3-D slice of {self}, which is not 3-D.")
        if not 0 <= e < self.shape[0]:
            raise WeightError(f"Matrix {e} of {self}: it has {self.shape[0]}.")
        zeros = None if self.zeros is None else self.zeros[e]
        return replace(self, shape=self.shape[1:], data=self.data[e], scales=self.scales[e], zeros=zeros)

    def rows(self, start: int, stop: int, step: int = 1) -> "ScaledWeight":
        """Rows `start`, `start + step`, ... before `stop` of a matrix, without a copy.

        Raises WeightError where a cut would go through a block of scales or a word.
        """
        if len(self.shape) != 2:
            raise WeightError(f"A 2-D slice of {self}, which is not 2-D.")
        if not 0 <= start < stop <= self.shape[0] or step < 1:
            raise WeightError(f"Rows {start}:{stop}:{step} of {self}: expected some of its {self.shape[0]}.")
        shape = (len(range(start, stop, step)), self.shape[1])
        if (start, shape) == (0, self.shape):
            return self
        unit = self._row_unit(step)
        if unit > 1 and (step > 1 or start % unit or (stop % unit and stop != self.shape[0])):
            raise WeightError(
                f"Rows {start}:{stop}:{step} of {self}: expected multiples of {unit}, as its scales or words hold "
                f"{unit} rows each. Use an operator that dequantizes (KExpertsTorch)."
            )
        if self._groups_are_lines:
            word = 4 if self.type.layout == "gptq" else 4 / self.type.per_word
            return replace(
                self, shape=shape, data=_columns(self.data, word, start, stop),
                scales=_columns(self.scales, self._scale_size, start, stop),
                zeros=None if self.zeros is None else _columns(self.zeros, 4 / self.type.per_word, start, stop),
            )  # fmt: skip
        scales = self.scales
        if len(scales) > 1:
            scales = scales[start // self.scale_rows : math.ceil(stop / self.scale_rows) : step]
        zeros = self.zeros
        if zeros is not None:
            zeros = zeros[start // self.type.per_word : math.ceil(stop / self.type.per_word)]
        return replace(self, shape=shape, data=self.data[start:stop:step], scales=scales, zeros=zeros)

    def _row_unit(self, step: int) -> int:
        """Of how many rows a slice must be a multiple."""
        if self._groups_are_lines:
            packed = self.type.layout == "awq" or self.zeros is not None
            return self.type.per_word if packed else (2 if step > 1 else 1)
        scales = self.scale_rows if len(self.scales) > 1 else 1
        return math.lcm(scales, self.type.per_word) if self.zeros is not None else scales

    def dequantize(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The numbers, in memory of their own. Peak memory: the result and a few `WEIGHTS_AT_ONCE`."""
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """As `dequantize`, into `out` of the same shape, any float dtype, any strides, any device."""
        if tuple(out.shape) != tuple(self.shape):
            raise WeightError(f"Cannot dequantize {self} into {list(out.shape)}; expected the same shape.")
        if len(self.shape) == 3:
            for e in range(self.shape[0]):
                self.expert(e).dequantize_into(out[e])
            return
        unit = self._row_unit(1)
        step = max(1, WEIGHTS_AT_ONCE // (self.shape[1] * unit)) * unit
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out[start:stop].copy_(self.rows(start, stop)._values(out.device))

    def _values(self, device: torch.device) -> Tensor:
        """The numbers of a small matrix, float32 [N, K]. Codes less zeros are exact; each product rounds once."""
        rows = self.shape[0]
        codes = self.type.unpack(_dense(self.data, device))
        scales = _dense(self.scales, device).view(SCALE_TYPES[self.scale_type]).float()
        zeros = float(self.type.zero) if self.zeros is None else self._zero_values(device)
        if self.global_scale != 1.0:
            scales = scales * self.global_scale
        group = self._group_of_columns(device)
        if self._groups_are_lines:
            scales = scales.T
        elif self.scale_rows > 1:
            scales = scales.repeat_interleave(min(self.scale_rows, rows), 0)[:rows]
        if isinstance(zeros, Tensor):
            zeros = zeros[:, group]
        return (codes - zeros) * scales[:, group]

    def _group_of_columns(self, device: torch.device) -> Tensor:
        """The group of each column, int64 [K]."""
        if self.order is not None:
            return self.order.to(device, torch.int64)
        return torch.arange(self.shape[1], device=device) // self.scale_cols

    def _zero_values(self, device: torch.device) -> Tensor:
        """Codes of value 0, float32 [N, G]."""
        data = _dense(self.zeros, device)
        if self.type.layout == "awq":
            return self.type.unpack(data) + self.zero_bias
        words = data.unflatten(-1, (-1, 4))
        codes = (_nibbles(words) if self.type.bits == 4 else words).float()  # [G, N/w, w], or [N/w, G, w] by rows
        if self._groups_are_lines:
            return codes.flatten(1).T + self.zero_bias
        return codes.transpose(1, 2).flatten(0, 1)[: self.shape[0]] + self.zero_bias


def _pitch(part: Tensor) -> int:
    return part.stride(-2) if part.shape[-2] > 1 else part.shape[-1]


def _span(part: Tensor) -> int:
    return (part.shape[-2] - 1) * part.stride(-2) + part.shape[-1]


def _columns(part: Tensor, size: float, start: int, stop: int) -> Tensor:
    """The bytes of rows `start` to `stop` of lines that hold `size` bytes of each row."""
    return part[..., int(start * size) : int(stop * size)]


def _dense(part: Tensor, device: torch.device) -> Tensor:
    """The bytes on `device`, in order, at an address that any type may be read from: a copy in any case."""
    return part.to(device, copy=True, memory_format=torch.contiguous_format)
