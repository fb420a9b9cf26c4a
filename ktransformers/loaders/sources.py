"""How one tensor of the model is made from tensors of the checkpoint.

A source knows shapes and names without reading data. Most are one tensor as it is; the others undo what a
converter did. Letters: E experts, H hidden, I expert intermediate; h heads.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.loaders.base import TensorInfo, WeightFiles
from ktransformers.loaders.gguf_layouts import Layout
from ktransformers.quants.blocks import Packed, QuantType
from ktransformers.quants.scaled import ScaledType, ScaledWeight

Device = torch.device | str


class Source(ABC):
    """One tensor of the model. `names` are the checkpoint's tensors it is made from, `shape` is what results.

    `broken`: the parts do not fit together, so there is no shape and nothing can be delivered.
    """

    files: WeightFiles
    names: tuple[str, ...]
    shape: tuple[int, ...]
    broken = False

    @property
    def infos(self) -> list[TensorInfo]:
        return [self.files.info(name) for name in self.names]

    @property
    def native_dtype(self) -> torch.dtype:
        """The stored float type when all parts have it, else float32."""
        dtypes = {info.type.torch_dtype for info in self.infos}
        return (dtypes.pop() if len(dtypes) == 1 else None) or torch.float32

    def computes(self, kind: QuantType | ScaledType) -> bool:
        """Whether a part stored as `kind` can be turned into the numbers of this tensor."""
        return kind.computed

    can_pack = False

    def packed(self) -> Packed | ScaledWeight:
        raise WeightError(
            f"made from {len(self.names)} tensors ({self.names[0]}, ...), so there are no bytes to use "
            "as they are. Use tensor() or experts()."
        )

    @abstractmethod
    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        """The numbers, of `shape`, in memory of their own."""


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


class Plain(Source):
    """One tensor as it is; plain numbers perhaps with dimensions of size one more or fewer (a gate [H] for [1, H])."""

    can_pack = True

    def __init__(self, files: WeightFiles, name: str, shape: tuple[int, ...] | None = None) -> None:
        stored = files.info(name).shape
        kind = files.info(name).type
        fits = shape is not None and not isinstance(kind, ScaledType) and _without_ones(shape) == _without_ones(stored)
        self.files, self.names = files, (name,)
        self.shape = shape if fits and (shape[-1:] == stored[-1:] or kind.block == 1) else stored

    def packed(self) -> Packed | ScaledWeight:
        packed = self.files.packed(self.names[0])
        return packed if packed.shape == self.shape else Packed(packed.data, packed.type, self.shape)

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        return self.packed().dequantize(dtype, device)


class StoredTransposed(Plain):
    """Experts stored in floats as the model holds them, [E, K, N], as aria and Llama-4 have them."""

    can_pack = False  # there are no rows in it, only columns

    @property
    def rows(self) -> int:
        """N: the rows that each of the E matrices [N, K] has."""
        return self.infos[0].shape[-1]

    def matrices(self, rows: slice) -> "Matrices":
        """`rows` of the E matrices [N, K]: a copy, as rows of a column-wise file are bytes far apart."""
        stack, kind = self.packed(), self.infos[0].type
        cut = (stack.expert(e).dequantize(kind.torch_dtype).T[rows].contiguous() for e in range(self.shape[0]))
        return [Packed(matrix.view(-1).view(torch.uint8), kind, tuple(matrix.shape)) for matrix in cut]


class TransposedRows(StoredTransposed):
    """Experts that the model holds as rows, [E, N, K], and the file in floats as [E, K, N], as Qwen3-VL-MoE's."""

    def __init__(self, files: WeightFiles, name: str) -> None:
        super().__init__(files, name)
        self.shape = (self.shape[0], *self.shape[:0:-1])

    def packed(self) -> Packed:
        return self.files.packed(self.names[0])

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        return self.packed().dequantize(dtype, device).transpose(1, 2).contiguous()


class RowsInTurn(Plain):
    """Gate and up [E, 2I, H] that the model holds one after the other and the file row by row in turn (Inkling)."""

    can_pack = False

    def matrices(self, first: int) -> "Matrices":
        """Of the E matrices every other row from `first` on: a copy, but for forms whose rows may lie apart."""
        whole = self.packed()
        return [_every_other(whole.expert(e), first) for e in range(self.shape[0])]

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        stored = self.packed().dequantize(dtype, device)
        return torch.cat((stored[:, 0::2], stored[:, 1::2]), 1)


def _every_other(matrix: Packed | ScaledWeight, first: int) -> Packed | ScaledWeight:
    rows, columns = matrix.shape
    if isinstance(matrix, ScaledWeight):
        return matrix.rows(first, rows, 2)
    return Packed(matrix.data.view(rows, -1)[first::2].reshape(-1), matrix.type, (rows // 2, columns))


class ModelTransposed(Source):
    """Experts that the model holds as [E, K, N] and the file as packed rows [E, N, K], as gpt-oss' MXFP4 has them."""

    def __init__(self, files: WeightFiles, name: str) -> None:
        self.files, self.names = files, (name,)
        experts, rows, columns = files.info(name).shape
        self.shape = (experts, columns, rows)

    def stored(self) -> ScaledWeight:
        """The packed rows [E, N, K]."""
        return self.files.packed(self.names[0])

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self.stored().dequantize_into(out.transpose(1, 2))
        return out


WHOLE_NUMBERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Stored types of tables of indices and flags, which `quants` does not compute because no weight has them."""


class WholeNumbers(Plain):
    """A tensor that the model holds as integers or flags, such as DeepSeek-V4's table from token to expert."""

    @property
    def native_dtype(self) -> torch.dtype:
        return WHOLE_NUMBERS[self.infos[0].type.name]

    def computes(self, kind: QuantType) -> bool:
        return kind.name in WHOLE_NUMBERS

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        stored = self.packed().data.clone().view(self.native_dtype)  # cloned: the file's address may be odd
        return stored.view(self.shape).to(device, dtype)


class Converted(Source):
    """A tensor that transformers makes from others by operations of its own, which run here as they run there.

    `parts`: checkpoint names by transformers' pattern. `target`: which of the converter's results this one is.
    `first`: the model's name of the first of them, by which operations find the model's shapes.
    """

    def __init__(
        self, files: WeightFiles, parts: dict[str, list[str]], converter: Any, target: str, first: str, model: Any
    ):
        self.files, self.parts, self.converter, self.target, self.model = files, parts, converter, target, model
        self.first = first
        self.names = tuple(name for names in parts.values() for name in names)
        self.broken, self.shape = False, ()
        try:
            self.shape = tuple(self._convert("meta", torch.float32).shape)
        except (RuntimeError, ValueError, KeyError, IndexError):  # sizes that do not fit together, a part that lacks
            self.broken = True

    def _convert(self, device: Device, dtype: torch.dtype) -> Tensor:
        def read(name: str) -> Tensor:
            if str(device) == "meta":
                return torch.empty(self.files.info(name).shape, device="meta")
            return self.files.tensor(name, device, dtype)

        tensors = {pattern: [read(name) for name in names] for pattern, names in self.parts.items()}
        told = {"full_layer_name": self.first, "model": self.model, "config": self.model.config}
        sources, targets = self.converter.source_patterns, self.converter.target_patterns
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, source_patterns=sources, target_patterns=targets, **told)
        made = tensors[self.target]
        return made[0] if isinstance(made, list) else made

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        return self._convert(device, dtype)


class Permuted(Source):
    """A tensor that a GGUF file holds in another layout, in one part or several (see gguf_layouts.py).

    Where only whole rows move, packed bytes can be put in order as they are, at the price of one copy of this tensor.
    """

    def __init__(
        self, files: WeightFiles, names: Sequence[str], layout: Layout, shape: tuple[int, ...], config
    ) -> None:
        self.files, self.names, self.layout, self.config = files, tuple(names), layout, config
        try:
            self._stored = layout.shapes(shape, config)
        except (ValueError, RuntimeError, ZeroDivisionError):  # the config's heads do not divide the shape
            self._stored = []
        self.broken = not self._stored or not all(map(_holds, self.infos, self._stored))
        self.shape = () if self.broken else shape
        self.can_pack = layout.rows is not None

    def packed(self) -> Packed:
        if not self.can_pack:
            return super().packed()
        packed = self.files.packed(self.names[0])
        if packed.type.block > 1 and len(self.shape) == 1:
            raise WeightError(f"a vector of {packed.type.name} blocks has no rows to reorder. Use tensor().")
        rows, order = packed.data.view(self.shape[0], -1), self.layout.rows(self.shape, self.config)
        out = torch.empty_like(rows)
        out[order] = rows
        return Packed(out.view(-1), packed.type, self.shape)

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        made = dtype if self.layout.exact else torch.float32
        parts = [self.files.tensor(name, "cpu", made).view(s) for name, s in zip(self.names, self._stored, strict=True)]
        return self.layout.load(parts, self.shape, self.config).to(device, dtype)


def _holds(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is one of `shape`, dimensions flattened or not; blocks stay within rows."""
    same_rows = info.shape[-1:] == shape[-1:]
    return math.prod(info.shape) == math.prod(shape) and (
        same_rows or (info.type.block == 1 and _without_ones(info.shape) == _without_ones(shape))
    )


class Stacked(Source):
    """Expert weights [E, rows, columns], concatenated along the rows from one or two parts (gate, then up).

    A part is the name of one stacked tensor or the names of E matrices in the order of the experts.
    """

    def __init__(self, files: WeightFiles, parts: Sequence[str | tuple[str, ...]]) -> None:
        self.files, self.parts = files, tuple(parts)
        self.names = tuple(name for part in parts for name in ((part,) if isinstance(part, str) else part))
        self.shape = self._joined_shape()
        self.broken = not self.shape
        self.can_pack = len(self.parts) == 1 and isinstance(self.parts[0], str)

    def _part_shapes(self, part: str | tuple[str, ...]) -> set[tuple[int, ...]]:
        if isinstance(part, str):
            return {self.files.info(part).shape}
        return {(len(part), *self.files.info(name).shape) for name in part}

    def _joined_shape(self) -> tuple[int, ...]:
        """The shape, or () when the matrices do not fit together."""
        shapes = [shape for part in self.parts for shape in sorted(self._part_shapes(part))]
        fits = (
            len(shapes) == len(self.parts)
            and {len(s) for s in shapes} == {3}
            and len({(s[0], s[2]) for s in shapes}) == 1
        )
        return (shapes[0][0], sum(s[1] for s in shapes), shapes[0][2]) if fits else ()

    def matrices(self, part: int) -> list[Packed | ScaledWeight]:
        """The E matrices of a part, as views."""
        names = self.parts[part]
        if isinstance(names, str):
            whole = self.files.packed(names)
            return [whole.expert(e) for e in range(whole.shape[0])]
        return [self.files.packed(name) for name in names]

    def packed(self) -> Packed | ScaledWeight:
        return self.files.packed(self.parts[0]) if self.can_pack else super().packed()

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=device)
        row = 0
        for part in range(len(self.parts)):
            for e, matrix in enumerate(self.matrices(part)):
                matrix.dequantize_into(out[e, row : row + matrix.shape[0]])
            row += matrix.shape[0]
        return out


class StackedColumns(Stacked):
    """The same for a model that holds experts as [E, columns, rows]; `interleaved`: the rows of two parts alternate."""

    def __init__(self, files: WeightFiles, parts: Sequence[str | tuple[str, ...]], interleaved: bool) -> None:
        super().__init__(files, parts)
        self.interleaved = interleaved and len(self.parts) == 2
        if not self.broken:
            experts, rows, columns = self.shape
            self.shape = (experts, columns, rows)
        self.can_pack = False

    def tensor(self, device: Device, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=device)
        rows, n = out.transpose(1, 2), len(self.parts)
        for part in range(n):
            target = rows[:, part::n] if self.interleaved else rows.chunk(n, 1)[part]
            for e, matrix in enumerate(self.matrices(part)):
                target[e] = matrix.dequantize(dtype, device)
        return out


Matrices = list[Packed | ScaledWeight]


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer: E packed matrices each, gate and up [I, H], down [H, I]; `gate` may be None.

    Biases are float32, gate and up [E, I], down [E, H]; None where the family has none.
    """

    gate: Matrices | None
    up: Matrices
    down: Matrices
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    copied: bool = False  # the matrices are in memory of their own, not views of the file


def split_gate_up(source: Source, interleaved: bool = False) -> tuple[Matrices, Matrices]:
    """The gate and up matrices of a `gate_up_proj` source; one fused tensor is cut in the middle, or into its even
    and odd rows where they are `interleaved`."""
    if isinstance(source, Stacked) and len(source.parts) == 2:
        return source.matrices(0), source.matrices(1)
    if isinstance(source, StoredTransposed):
        rows = source.rows // 2
        halves = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(rows), slice(rows, None))
        return source.matrices(halves[0]), source.matrices(halves[1])
    if isinstance(source, RowsInTurn):
        return source.matrices(0), source.matrices(1)
    fused = source.stored() if isinstance(source, ModelTransposed) else source.packed()
    rows = fused.shape[1] // 2
    experts = [fused.expert(e) for e in range(fused.shape[0])]
    if interleaved:
        return [_every_other(e, 0) for e in experts], [_every_other(e, 1) for e in experts]
    return [e.rows(0, rows) for e in experts], [e.rows(rows, 2 * rows) for e in experts]


def split_gate_up_bias(bias: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """A bias [E, 2I] as gate's and up's [E, I]."""
    gate, up = (bias[:, 0::2], bias[:, 1::2]) if interleaved else bias.chunk(2, dim=1)
    return gate.contiguous(), up.contiguous()


def split_down(source: Source) -> Matrices:
    """The matrices of a `down_proj` source, or of an `up_proj` without a gate."""
    if isinstance(source, Stacked):
        return source.matrices(0)
    if isinstance(source, StoredTransposed):
        return source.matrices(slice(None))
    packed = source.stored() if isinstance(source, ModelTransposed) else source.packed()
    return [packed.expert(e) for e in range(packed.shape[0])]
