"""Which packed form each published format has on a GPU, and its bytes: all that can be known without a weight.

Letters: N rows, K columns, G groups of columns that share a scale, P rows padded to a multiple of 16, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.quants.blocks import Packed, QuantType
from ktransformers.quants.scaled import ScaledWeight

ROWS_OF_16 = 16
COLUMNS_OF_32 = 32
"""What N is padded to, and what K must be a multiple of: the kernels' loads of 16 bytes depend on both."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code -> bits of each plane, the low bits of a code first."""

SCALES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "E8M0": torch.uint8,
    "U8": torch.uint8, "I8": torch.int8, "NIBBLES": torch.uint8,
}  # fmt: skip
"""How scales are stored. U8 and I8 are multiplied by an fp16 `d` per 256 columns; so are NIBBLES, a byte with the scale
in its low half and the minimum in its high half. E8M0 is a power of two, 255 read as 2^128."""

MINIMA = {"": None, "F16": torch.float16, "U8": torch.uint8, "ZEROS": torch.uint8}
"""How what is subtracted is stored. "": nothing, or `zero` times the scale. U8 is multiplied by an fp16 `dmin` per 256
columns. ZEROS: codes of value 0, less `zero_bias`."""

TABLES = {
    "E2M1": (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6),
    "IQ4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
"""Values of codes that are no integers."""


@dataclass(frozen=True)
class Layout:
    """What all weights of one kind have in common: all that decides their bytes, and which kernel computes them.

    `group`: columns that share a scale, 0 for all. `values`: "" where codes are values, E4M3, or a key of TABLES.
    `order`: the columns of a matrix are sorted by their groups, `Words.order` says how.
    """

    name: str
    bits: int
    group: int
    scale: str
    zero: int = 0
    minimum: str = ""
    values: str = ""
    zero_bias: int = 0
    order: bool = False

    @property
    def super_blocks(self) -> bool:
        """Whether there is an fp16 factor of scales per 256 columns."""
        return self.scale in ("U8", "I8", "NIBBLES")

    @property
    def super_minima(self) -> bool:
        return self.minimum == "U8" or self.scale == "NIBBLES"

    def groups(self, columns: int) -> int:
        """G of a weight of `columns`. Raises WeightError where the kernels cannot take so many."""
        unit = math.lcm(COLUMNS_OF_32, self.group or 1, 256 if self.super_blocks else 1)
        if columns % unit or columns < 1:
            raise WeightError(
                f"{self.name} with {columns} columns: on a GPU packed weights need a multiple of {unit}."
            )
        return columns // self.group if self.group else 1

    def takes(self, columns: int) -> bool:
        """Whether a weight of so many columns can be packed so."""
        try:
            return self.groups(columns) > 0
        except WeightError:
            return False

    def lines(self, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        """Part of a weight -> how many lines of P elements it has, and of which type."""
        groups = self.groups(columns)
        made = {f"plane{i}": (columns * bits // 32, torch.int32) for i, bits in enumerate(PLANES[self.bits])}
        made["scales"] = (groups, SCALES[self.scale])
        if self.minimum:
            made["minima"] = (groups, MINIMA[self.minimum])
        if self.super_blocks:
            made["d"] = (columns // 256, torch.float16)
        if self.super_minima:
            made["dmin"] = (columns // 256, torch.float16)
        return made

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight [N, K] or [E, N, K] on the GPU."""
        *experts, rows, columns = shape
        line = sum(count * dtype.itemsize for count, dtype in self.lines(columns).values())
        return math.prod(experts) * line * padded(rows) + (columns * 4 if self.order else 0)


_GGUF = {
    layout.name: layout
    for layout in (
        Layout("Q4_0", 4, 32, "F16", zero=8),
        Layout("Q4_1", 4, 32, "F16", minimum="F16"),
        Layout("Q5_0", 5, 32, "F16", zero=16),
        Layout("Q5_1", 5, 32, "F16", minimum="F16"),
        Layout("Q8_0", 8, 32, "F16", zero=128),
        Layout("Q2_K", 2, 16, "NIBBLES"),
        Layout("Q3_K", 3, 16, "I8", zero=4),
        Layout("Q4_K", 4, 32, "U8", minimum="U8"),
        Layout("Q5_K", 5, 32, "U8", minimum="U8"),
        Layout("Q6_K", 6, 16, "I8", zero=32),
        Layout("IQ4_NL", 4, 32, "F16", values="IQ4"),
        Layout("IQ4_XS", 4, 32, "I8", values="IQ4"),
        Layout("MXFP4", 4, 32, "E8M0", values="E2M1"),
    )
}

_SCALED = {
    "I8": Layout("I8", 8, 0, "F16", zero=128),
    "U8": Layout("U8", 8, 0, "F16", zero=128),
    "I4": Layout("I4", 4, 0, "F16", zero=8),
    "GPTQ4": Layout("GPTQ4", 4, 0, "F16", zero=8),
    "GPTQ8": Layout("GPTQ8", 8, 0, "F16", zero=128),
    "AWQ4": Layout("AWQ4", 4, 0, "F16", zero=8),
    "F4_E2M1": Layout("F4_E2M1", 4, 0, "F16", values="E2M1"),
    "F8_E4M3": Layout("F8_E4M3", 8, 0, "F32", values="E4M3"),
}
"""Without what a checkpoint says of the scales."""

GGUF_TYPES, SCALED_TYPES = tuple(_GGUF), tuple(_SCALED)
"""Names of the types that have words."""


def padded(rows: int) -> int:
    """P of N."""
    return -(-rows // ROWS_OF_16) * ROWS_OF_16


def layout_of(weight: Any) -> Layout:
    """The layout of a weight (`words.Weight`), or of a GGUF type. Raises UnsupportedError where there is none."""
    if isinstance(own := getattr(weight, "layout", None), Layout):
        return own  # of floats, which have that of what they are quantized to
    if isinstance(weight, ScaledWeight):
        return _scaled_layout(weight)
    kind = weight.type if isinstance(weight, Packed) else weight
    name = kind if isinstance(kind, str) else kind.name
    if name not in _GGUF:
        raise UnsupportedError(
            f"Weights of type {name} have no packed form on a GPU (there are {', '.join((*_GGUF, *_SCALED))})."
        )
    return _GGUF[name]


def scaled_layout(
    name: str,
    columns: int,
    group: int,
    scale: str = "F16",
    zeros: bool = False,
    zero_bias: int = 0,
    order: bool = False,
) -> Layout:
    """The layout of a type whose scales lie apart, of `group` columns each, `scale` a key of `scaled.SCALE_TYPES`.

    Raises UnsupportedError where the kernels do not compute such.
    """
    whole = group >= columns
    fits = name in _SCALED and (whole or (group >= 16 and group & (group - 1) == 0))
    if not fits or (scale == "E8M0" and not _SCALED[name].values):
        raise UnsupportedError(
            f"{name} in groups of {group} with scales of {scale} has no packed form on a GPU (there are "
            f"{', '.join(_SCALED)}, groups 16, 32, 64, ... or whole rows, E8M0 for floats only)."
        )
    return replace(
        _SCALED[name], group=0 if whole else group, scale="F16" if scale == "E4M3" else scale,
        minimum="ZEROS" if zeros else "", zero_bias=zero_bias if zeros else 0, order=order,
    )  # fmt: skip


def quantized_layout(dtype: torch.dtype, columns: int, num_bits: int = 4, group_size: int = 128) -> Layout:
    """Of floats in upstream's Marlin form: symmetric codes about 8 or 128, scales of the weight's own type, which reach
    as far as it does. `group_size` -1: one scale a row. Raises UnsupportedError for other bits and odd groups."""
    if num_bits not in (4, 8):
        raise UnsupportedError(f"Quantizing to {num_bits} bits: expected num_bits 4 or 8.")
    scale = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")
    group = columns if group_size == -1 else group_size
    layout = scaled_layout("U8" if num_bits == 8 else "I4", columns, group, scale)
    return replace(layout, name=f"INT{num_bits}")


def _scaled_layout(weight: ScaledWeight) -> Layout:
    columns = weight.shape[-1]
    if weight.order is not None:
        _check_order(weight)
    scale = "F32" if weight.global_scale != 1.0 and weight.scale_type != "E8M0" else weight.scale_type
    if scale == "E8M0" and weight.global_scale != 1.0:
        raise UnsupportedError(f"{weight} with powers of two and a global scale has no packed form on a GPU.")
    return scaled_layout(
        weight.type.name, columns, weight.scale_cols, scale, weight.zeros is not None, weight.zero_bias,
        weight.order is not None,
    )  # fmt: skip


def _check_order(weight: ScaledWeight) -> None:
    columns, group = weight.shape[-1], weight.scale_cols
    even = torch.arange(columns, dtype=torch.int32) // group
    if columns % group or not torch.equal(weight.order.sort().values, even):
        raise UnsupportedError(
            f"{weight}: its groups have different numbers of columns, so it has no packed form on a GPU."
        )


def words_bytes(kind: Layout | QuantType | str, shape: Sequence[int]) -> int:
    """Bytes on the GPU of a weight [N, K] or [E, N, K], from its type and shape alone."""
    return (kind if isinstance(kind, Layout) else layout_of(kind)).nbytes(shape)
