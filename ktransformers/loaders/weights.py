"""A checkpoint that answers in module names: what operators get as `gguf_loader`, whatever the format."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean
from ktransformers.loaders import schemes
from ktransformers.loaders.base import TensorInfo, WeightFiles
from ktransformers.loaders.binding import Binding, Shapes
from ktransformers.loaders.problems import TensorProblem, grouped
from ktransformers.loaders.sources import (
    Converted,
    ExpertWeights,
    ModelTransposed,
    Plain,
    RowsInTurn,
    Source,
    StoredTransposed,
    TransposedRows,
    split_down,
    split_gate_up,
    split_gate_up_bias,
)
from ktransformers.quants.blocks import Packed
from ktransformers.quants.scaled import ScaledWeight


class ModelWeights:
    """A checkpoint that answers in module names (`model.layers.3.mlp.experts.gate_up_proj`): a `WeightSource`.

    This is what operators get as `gguf_loader`, whatever the format. Every method that takes a name raises
    WeightError with the closest known one when the checkpoint cannot deliver it.
    """

    def __init__(self, files: WeightFiles, binding: Binding) -> None:
        self.files = files
        self.format = files.format
        self.on_read: Callable[[str], None] | None = None
        """Called with the name of each tensor that is delivered, so that loading can show how far it is."""
        self._binding = binding
        self._sources = binding.sources

    def names(self) -> list[str]:
        """Module-space names of everything the checkpoint can deliver."""
        return list(self._sources)

    def has(self, name: str) -> bool:
        return name in self._sources

    @property
    def path(self) -> Path:
        """What to call the checkpoint in a message: its file, or the folder of its files."""
        return self.files.paths[0] if len(self.files.paths) == 1 else self.files.paths[0].parent

    def _deliver(self, name: str) -> Source:
        source = self.source(name)
        if source.broken:
            raise WeightError(f"{name}: its parts in the checkpoint do not fit together: {_shapes(source)}.")
        if self.on_read is not None:
            self.on_read(name)
        return source

    def source(self, name: str) -> Source:
        if name not in self._sources:
            raise WeightError(f"The checkpoint has no weights for {name}{did_you_mean(name, self._sources)}.")
        return self._sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source(name).shape

    def infos(self, name: str) -> list[TensorInfo]:
        """The checkpoint's tensors of `name`, as it describes them."""
        return self.source(name).infos

    def quant_type(self, name: str) -> str:
        """The stored type, "Q4_K" or "Q4_K+Q6_K" when several tensors of different types make one."""
        return "+".join(dict.fromkeys(info.type.name for info in self.source(name).infos))

    def methods(self, name: str) -> list[str]:
        """Every way in which parts of `name` are stored, by the names that users have for them, such as FP8, RAWINT4
        or, for all of GGUF, LLAMAFILE."""
        if self.format == "gguf":
            return ["LLAMAFILE"]
        return list(dict.fromkeys(schemes.methods(info)[0] for info in self.source(name).infos))

    def is_stored_as(self, name: str, method: str) -> bool:
        """Whether every part of `name` is stored in a way that users call `method`."""
        if self.format == "gguf":
            return method == "LLAMAFILE"
        return all(method in schemes.methods(info) for info in self.source(name).infos)

    def nbytes(self, name: str) -> int:
        """Bytes of the stored tensors of `name`."""
        return sum(info.nbytes for info in self.source(name).infos)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's own names of the tensors of `name`."""
        return self.source(name).names

    def tensor(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """The numbers, in memory of their own; `dtype` None is the stored float type, else float32.

        Peak memory is the result and a few MiB, for synthesized tensors twice the result. Raises
        UnsupportedError for a type that this version does not compute.
        """
        source = self._deliver(name)
        return source.tensor(device, dtype or source.native_dtype)

    def can_pack(self, name: str) -> bool:
        """Whether `packed(name)` can deliver, that is whether stored rows can be used as they are."""
        return self.has(name) and self._sources[name].can_pack

    def packed(self, name: str) -> Packed | ScaledWeight:
        """The stored bytes, a view of the mapped file; a q or k projection of a llama-type GGUF is one copy.

        Raises WeightError for a tensor that is made from several; use `tensor` or `experts` for those.
        """
        source = self._deliver(name)
        try:
            return source.packed()
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error

    def same(self, name: str, other: str) -> bool:
        """Whether two names may be one tensor: both have the same numbers, or one is not there. Reads both."""
        one, two = self._sources.get(name), self._sources.get(other)
        if one is None or two is None or one is two:
            return True
        if one.shape != two.shape or one.broken or two.broken or not (one.can_pack and two.can_pack):
            return False
        return _equal(one.packed(), two.packed())

    def has_experts(self, prefix: str) -> bool:
        return self.has(f"{prefix}.{self._first(prefix)}") and self.has(f"{prefix}.down_proj")

    def _first(self, prefix: str) -> str:
        """What multiplies the input of experts: gate and up, or up alone where there is no gate."""
        return "up_proj" if self.has(f"{prefix}.up_proj") else "gate_up_proj"

    def experts_problem(self, prefix: str) -> str:
        """Say why `experts(prefix)` cannot deliver packed rows, or return ``""``."""
        for name in (f"{prefix}.{self._first(prefix)}", f"{prefix}.down_proj"):
            source = self.source(name)
            exchanged = isinstance(source, (ModelTransposed, StoredTransposed)) and type(source) is not TransposedRows
            if isinstance(source, Converted) or exchanged != (name in self._binding.transposed):
                return f"{name} is stored in another form than its rows, so there are no packed rows of it"
            rows = source.shape[-1 if exchanged else 1] if len(source.shape) == 3 else 1
            if len(source.shape) != 3 or (name.endswith("gate_up_proj") and rows % 2):
                return f"{name} is no stack of matrices: {_shapes(source)}"
        return ""

    def experts(self, prefix: str) -> ExpertWeights:
        """The routed experts of the module `prefix` (`model.layers.3.mlp.experts`), packed.

        Copied are biases, and matrices where the file has no rows, only columns.
        """
        first = self._first(prefix)
        gate_up, down = self._deliver(f"{prefix}.{first}"), self._deliver(f"{prefix}.down_proj")
        if problem := self.experts_problem(prefix):
            raise WeightError(f"{problem}. Use tensor().")
        interleaved = f"{prefix}.gate_up_proj" in self._binding.interleaved
        gate_bias = up_bias = down_bias = None
        if self.has(name := f"{prefix}.gate_up_proj_bias"):
            gate_bias, up_bias = split_gate_up_bias(self.tensor(name, dtype=torch.float32), interleaved)
        if self.has(name := f"{prefix}.down_proj_bias"):
            down_bias = self.tensor(name, dtype=torch.float32)
        gate, up = split_gate_up(gate_up, interleaved) if first == "gate_up_proj" else (None, split_down(gate_up))
        in_turn = isinstance(gate_up, RowsInTurn) or interleaved and type(gate_up) is Plain and type(gate[0]) is Packed
        copied = isinstance(down, StoredTransposed) or in_turn
        return ExpertWeights(gate, up, split_down(down), gate_bias, up_bias, down_bias, copied)

    def problems(self, expected: Shapes, ignore_unexpected: Iterable[str] = ()) -> list[str]:
        """Every missing, misshapen, uncomputable and unused tensor; equal ones of many layers are one line.

        `expected` is what the model needs, by module name; `ignore_unexpected` are regular expressions of
        checkpoint names that may be left over. Reads no tensor data.
        """
        binding = self._binding
        missing = [name for name in expected if name not in self._sources]
        unused = self._unused(ignore_unexpected)
        found = [TensorProblem(name, self._missing_text(name, unused, len(missing))) for name in missing]
        for name, shape in expected.items():
            if name in self._sources:
                found += self._misfits(name, tuple(shape))
        found += [TensorProblem(name, "in the checkpoint, but the model has no place for it") for name in unused]
        notes = binding.notes
        if found and self.files.method and self.files.method not in schemes.READ:
            known = ", ".join(schemes.READ)
            notes = [f"its config names quant_method {self.files.method!r}, not read yet (read: {known})", *notes]
        if missing and self.files.passed_over:
            other = f"{self.path if self.path.is_dir() else self.path.parent} also holds {self.files.passed_over}"
            notes = [*notes, f"{other}, which is not read, as transformers does not; give its path to read it instead"]
        return notes + grouped(found)

    def _missing_text(self, name: str, unused: list[str], missing: int) -> str:
        text = self._binding.absent.get(name, "missing in the checkpoint")
        few = missing <= 20 and len(unused) <= 200  # else the hint costs more than it helps
        return text + (did_you_mean(name, unused) if few else "")

    def _misfits(self, name: str, shape: tuple[int, ...]) -> list[TensorProblem]:
        source = self._sources[name]
        found = []
        if faults := [info for info in source.infos if info.fault]:
            more = f" (and {len(faults) - 1} more of its tensors)" if len(faults) > 1 else ""
            where = f"{faults[0].name}: " if faults[0].name != name else ""
            return [TensorProblem(name, f"{where}{faults[0].fault}{more}")]
        shape = (self._binding.experts.get(name, shape[0]), *shape[1:]) if shape else shape
        if source.shape != shape or source.broken:
            text = f"has shape {_shapes(source)} in the checkpoint, the model expects {list(shape)}"
            found.append(TensorProblem(name, text))
        for kind in dict.fromkeys(info.type for info in source.infos):
            if not source.computes(kind):
                found.append(TensorProblem(name, f"stored as {kind.name}, not computed yet; {_OTHER[self.format]}"))
        return found

    def _unused(self, ignore_unexpected: Iterable[str]) -> list[str]:
        used = {name for source in self._sources.values() for name in source.names} | self._binding.harmless
        patterns = [re.compile(pattern) for pattern in (*self._binding.ignored, *ignore_unexpected)]
        return [n for n in self.files.names() if n not in used and not any(p.search(n) for p in patterns)]

    def close(self) -> None:
        self.files.close()

    def __deepcopy__(self, memo: dict) -> "ModelWeights":
        """A copied model without operators reads nothing more from the files, so both may hold them."""
        return self

    def __reduce_ex__(self, protocol: object) -> object:
        raise UnsupportedError(
            f"{self.path}: open weights are mapped files and cannot be pickled. Save the model with "
            "save_pretrained, or set its `gguf_loader` to None first."
        )

    def __repr__(self) -> str:
        return (
            f"ModelWeights({len(self._sources)} tensors from {len(self.files.paths)} {self.format} file(s))"
        )


def _equal(one: Packed | ScaledWeight, two: Packed | ScaledWeight) -> bool:
    """Whether two matrices [N, K] have the same numbers; matrices with separate scales count as different."""
    if not isinstance(one, Packed) or not isinstance(two, Packed) or len(one.shape) != 2:
        return False
    if one.type is two.type:
        return torch.equal(one.data, two.data)
    pieces = [(row, min(row + _ROWS, one.shape[0])) for row in range(0, one.shape[0], _ROWS)]
    return all(torch.equal(one.rows(*piece).dequantize(), two.rows(*piece).dequantize()) for piece in pieces)


_ROWS = 256  # of two matrices, compared at once

_OTHER = {
    "gguf": "use another quantization",
    "safetensors": "save the model as bfloat16 with transformers (save_pretrained), or use a GGUF file of it",
}
"""What to do about a stored type that is not computed, by the checkpoint's format."""


def _shapes(source: Source) -> str:
    """The shape of a source, or the shapes of its parts when they do not fit together."""
    if not source.broken:
        return str(list(source.shape))
    return " and ".join(dict.fromkeys(str(list(info.shape)) for info in source.infos))
