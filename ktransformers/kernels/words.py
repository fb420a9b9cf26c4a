"""Packed weights on a GPU: one plain layout for every published format, exact, made while the bytes are copied up.

A weight [N, K] is `(code - zero) * scale`, or `code * scale - minimum`, its codes 2 to 8 bits wide; layouts.py says
what a format is. Here codes lie in 32-bit words along K, low bits first, and N is contiguous: threads beside each other
read columns beside each other. Codes of 3, 5 and 6 bits are two planes, 2+1, 4+1 and 4+2. Scales and minima keep the
bits that they are published in. So one kernel per width of codes serves GGUF, GPTQ, AWQ and compressed-tensors, linears
and experts.

Letters: N rows, K columns, G groups of columns that share a scale, P rows padded to a multiple of 16, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.kernels.floats import Floats
from ktransformers.kernels.layouts import PLANES, ROWS_OF_16, TABLES, Layout, layout_of, padded
from ktransformers.kernels.parts import Parts, of_blocks, of_scaled
from ktransformers.quants.blocks import WEIGHTS_AT_ONCE, Packed
from ktransformers.quants.scaled import ScaledWeight

Weight = Packed | ScaledWeight | Floats


@dataclass(frozen=True, eq=False)
class Words:
    """A weight [N, K], or E of them, as the kernels read it.

    planes: int32 [(E,) K * bits / 32, P] each. scales, minima: [(E,) G, P]. d, dmin: fp16 [(E,) K / 256, P].
    order: int32 [K], the column of the weight that each column here is, or None where they are the same.
    Rows from N to P are zeros of no meaning. Raises WeightError at construction where a part does not fit.
    """

    layout: Layout
    shape: tuple[int, ...]
    planes: tuple[Tensor, ...]
    scales: Tensor
    minima: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        *experts, rows, columns = self.shape
        wanted = self.layout.lines(columns)
        if len(self.parts) != len(wanted) or (self.order is not None) != self.layout.order:
            raise WeightError(f"{self}: has {', '.join(self.parts)}, expected {', '.join(wanted)}.")
        for name, (count, dtype) in wanted.items():
            part, shape = self.parts[name], [*experts, count, padded(rows)]
            fits = part.dtype == dtype and list(part.shape) == shape and part.stride(-1) == 1
            if not fits or part.stride(-2) != padded(rows) or part.device != self.device:
                raise WeightError(
                    f"{self}: {name} is {part.dtype} {list(part.shape)} on {part.device}, expected {dtype} {shape} "
                    f"on {self.device}, lines one after the other."
                )

    def __str__(self) -> str:
        return f"{self.layout.name} {list(self.shape)}"

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by the names of `Layout.lines`."""
        named = {f"plane{i}": plane for i, plane in enumerate(self.planes)}
        named |= {"scales": self.scales, "minima": self.minima, "d": self.d, "dmin": self.dmin}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def device(self) -> torch.device:
        return self.planes[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts; `words_bytes` says them beforehand."""
        return sum(part.nbytes for part in self.parts.values()) + (0 if self.order is None else self.order.nbytes)

    def expert(self, e: int) -> "Words":
        """Matrix `e` of a 3-D weight, without a copy."""
        if len(self.shape) != 3 or not 0 <= e < self.shape[0]:
            raise WeightError(f"Matrix {e} of {self}.")
        return self._with(self.shape[1:], {name: part[e] for name, part in self.parts.items()})

    def to(self, device: torch.device | str) -> "Words":
        moved = self._with(self.shape, {name: part.to(device) for name, part in self.parts.items()})
        return moved if self.order is None else replace(moved, order=self.order.to(device))

    def _with(self, shape: tuple[int, ...], parts: dict[str, Tensor]) -> "Words":
        order = None if self.order is None else self.order.to(parts["plane0"].device)
        return _assemble(self.layout, shape, parts, order)


def _assemble(layout: Layout, shape: tuple[int, ...], parts: dict[str, Tensor], order: Tensor | None = None) -> Words:
    planes = tuple(part for name, part in parts.items() if name.startswith("plane"))
    others = {name: part for name, part in parts.items() if not name.startswith("plane")}
    return Words(layout, tuple(shape), planes, **others, order=order)


# --- making them ----------------------------------------------------------------------------------------------------


def empty(layout: Layout, shape: Sequence[int], device: torch.device | str) -> Words:
    """Words of zeros, to be written by `write`."""
    *experts, rows, columns = shape
    parts = {
        name: torch.zeros(*experts, count, padded(rows), dtype=dtype, device=device)
        for name, (count, dtype) in layout.lines(columns).items()
    }
    order = torch.arange(columns, dtype=torch.int32, device=device) if layout.order else None
    return _assemble(layout, tuple(shape), parts, order)


def from_packed(weight: Weight, device: torch.device | str) -> Words:
    """A checkpoint's weight as words on `device`. Peak memory: the words and a few `WEIGHTS_AT_ONCE` there.

    Raises UnsupportedError for a type without words and WeightError for columns that make no whole groups.
    """
    made = empty(layout_of(weight), weight.shape, device)
    if len(weight.shape) == 2:
        write(made, weight)
    for e in range(weight.shape[0] if len(weight.shape) == 3 else 0):
        write(made.expert(e), weight.expert(e))
    return made


def from_experts(weights: Sequence[Weight], device: torch.device | str, below: Sequence[Weight] = ()) -> Words:
    """Matrices of one type and shape as words [E, N, K]; `below`: as many to come below them, as up's below gate's."""
    layouts = {layout_of(weight) for weight in (*weights, *below)}
    shapes = {tuple(weight.shape) for weight in (*weights, *below)}
    if len(layouts) != 1 or len(shapes) != 1 or any(layout.order for layout in layouts):
        kinds = sorted({str(weight.type) for weight in (*weights, *below)})
        raise UnsupportedError(
            f"Experts of {', '.join(kinds)} in shapes {sorted(shapes)}: on a GPU packed experts need one type and "
            "shape, and columns in their order."
        )
    rows, columns = shapes.pop()
    made = empty(layouts.pop(), (len(weights), rows * (2 if below else 1), columns), device)
    for start, matrices in ((0, weights), (rows, below)):
        for e, weight in enumerate(matrices):
            write(made.expert(e), weight, start)
    return made


def write(words: Words, weight: Weight, row: int = 0) -> None:
    """Write the matrix `weight` into the rows of `words` from `row` on: a whole weight, or gate and up in turn.

    Raises WeightError where type or shape differ.
    """
    rows, columns = weight.shape
    if layout_of(weight) != words.layout or columns != words.shape[-1] or row + rows > words.shape[0] or row % 16:
        raise WeightError(f"Cannot write {weight.type} {list(weight.shape)} at row {row} of {words}.")
    order = None
    if words.order is not None:
        order = weight.order.long().argsort(stable=True).to(words.device)
        if row and not torch.equal(words.order, order.to(torch.int32)):
            raise WeightError(f"Cannot write {weight} at row {row} of {words}: its columns have another order.")
        words.order.copy_(order)
    for start, stop in _chunks(weight):
        parts = _parts(weight.rows(start, stop), words)
        if order is not None:
            parts = replace(parts, codes=parts.codes[:, order])
        _store(words, parts, row + start)


def _parts(piece: Weight, words: Words) -> Parts:
    if isinstance(piece, Floats):
        return piece.parts(words.device, words.scales.dtype)
    return of_blocks(piece, words.device) if isinstance(piece, Packed) else of_scaled(piece, words.device)


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Rows to be taken at a time: bounded memory, cut where the words of the file may be."""
    rows, columns = weight.shape
    unit = ROWS_OF_16 if isinstance(weight, Packed) else math.lcm(ROWS_OF_16, weight._row_unit(1))
    step = max(1, WEIGHTS_AT_ONCE // (columns * unit)) * unit
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _store(words: Words, parts: Parts, row: int) -> None:
    """Write a few rows, [n, K] and [n, G], as columns."""
    at = slice(row, row + len(parts.codes))
    shift = 0
    for plane, bits in zip(words.planes, PLANES[words.layout.bits], strict=True):
        plane[:, at] = pack((parts.codes >> shift) & ((1 << bits) - 1), bits).T
        shift += bits
    for name in ("scales", "minima", "d", "dmin"):
        if (part := getattr(parts, name)) is not None:
            getattr(words, name)[:, at] = part.T


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] of `bits` each -> int32 [N, K * bits / 32], the first code in the lowest bits."""
    fields = codes.view(len(codes), -1, 32 // bits)
    made = fields[..., 0].to(torch.int32)
    for i in range(1, 32 // bits):
        made |= fields[..., i].to(torch.int32) << (i * bits)
    return made


def unpack(plane: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`, words along dimension -2: int32 [.., K * bits / 32, P] -> int32 [.., K, P]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=plane.device).view(-1, 1)
    return ((plane.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-3, -2)


# --- the reference --------------------------------------------------------------------------------------------------


def dequantize(words: Words, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers, [N, K] or [E, N, K] on the words' device: in fp32 the bits that `quants` gives for the same weight.

    Peak memory: the result and a few `WEIGHTS_AT_ONCE`.
    """
    out = torch.empty(words.shape, dtype=dtype, device=words.device)
    if len(words.shape) == 3:
        for e in range(words.shape[0]):
            out[e] = dequantize(words.expert(e), dtype)
        return out
    rows, columns = words.shape
    step = max(ROWS_OF_16, WEIGHTS_AT_ONCE // columns // ROWS_OF_16 * ROWS_OF_16)
    order = slice(None) if words.order is None else words.order.long()
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[start:stop, order] = _values(words, start, stop).T.to(dtype)
    return out


def codes(words: Words, start: int = 0, stop: int | None = None) -> Tensor:
    """Codes of rows `start` to `stop` of a matrix, int32 [K, rows]."""
    made, shift = None, 0
    for plane, bits in zip(words.planes, PLANES[words.layout.bits], strict=True):
        part = unpack(plane[:, start:stop], bits) << shift
        made = part if made is None else made | part
        shift += bits
    return made


def _values(words: Words, start: int, stop: int) -> Tensor:
    """Rows of a matrix as float32 [K, rows]. Each product and difference rounds once, as in quants."""
    layout, columns = words.layout, words.shape[-1]
    of_group = lambda part: part[:, start:stop].repeat_interleave(columns // len(part), 0)  # noqa: E731
    scale, minimum = _scale_and_minimum(words, start, stop)
    code = codes(words, start, stop)
    if layout.values:
        # MXFP4 is published as twice the value times half the scale, which matters at the ends of fp32.
        double = 2.0 if layout.scale == "E8M0" else 1.0
        value = _value(layout.values, code) * double
    elif layout.minimum == "ZEROS":
        value = code.float() - of_group(words.minima).float() - layout.zero_bias
    else:
        value = code.float() - layout.zero
    value = value * scale.repeat_interleave(columns // len(scale), 0)
    return value if minimum is None else value - minimum.repeat_interleave(columns // len(minimum), 0)


def _value(kind: str, code: Tensor) -> Tensor:
    """The float32 values of codes that are no integers."""
    if kind == "E4M3":
        return code.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.tensor(TABLES[kind], dtype=torch.float32, device=code.device)[code]


def _scale_and_minimum(words: Words, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """Of each group of some rows: the factor, and what is subtracted where the layout stores it: float32 [G, rows]."""
    part = {name: tensor[:, start:stop] for name, tensor in words.parts.items()}
    scale, minimum = part["scales"], part.get("minima")
    layout = words.layout
    if layout.scale == "E8M0":
        e = scale.int()
        half = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
        return half.view(torch.float32), None
    if layout.scale == "NIBBLES":
        scale, minimum = scale & 15, scale >> 4
    each = 256 // (layout.group or 256)
    if layout.super_blocks:
        scale = part["d"].float().repeat_interleave(each, 0) * scale.float()
    if layout.super_minima:
        minimum = part["dmin"].float().repeat_interleave(each, 0) * minimum.float()
    return scale.float(), None if minimum is None or layout.minimum == "ZEROS" else minimum.float()
