"""Importance matrices as llama.cpp's llama-imatrix writes them: how much each input column of a matrix mattered.

A row of weights meets activations; the mean square of the activations of a column, over some text, is what an error of
that column's weights costs. Two formats hold it, by the tensor names of GGUF files:

- GGUF: `NAME.in_sum2` F32 [matrices, columns], sums of squares, and `NAME.counts` F32 [matrices, 1], of how many.
- .dat: int32 number of entries, then for each int32 length, the name, int32 calls, int32 count and so many floats,
  which are means times calls; after them, maybe, the number of chunks and the name of the text.

Matrices: the experts of a stack; 1 for a plain matrix.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from ktransformers.errors import KTransformersError, WeightError, did_you_mean, join_errors
from ktransformers.loaders.base import MappedFile
from ktransformers.loaders.gguf import parse
from ktransformers.paths import existing_path

_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "Download it again, or make it again with llama-imatrix."


class Imatrix:
    """`of` gives the importances of a tensor. `entries`: name -> fp32, those of all its matrices."""

    def __init__(self, path: Path, entries: dict[str, Tensor]) -> None:
        self.path, self.entries = path, entries

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise one WeightError for all entries that no tensor of these has, or that do not fit its shape."""
        problems = []
        for name, values in self.entries.items():
            shape = shapes.get(name)
            if shape is None:
                problems.append(f"{name}: the model has no such tensor{did_you_mean(name, shapes)}.")
            elif len(values) not in _lengths(shape):
                expected = " or ".join(map(str, _lengths(shape)))
                problems.append(f"{name}: {len(values)} values, expected {expected} for {list(shape)}.")
        if problems:
            more = [*problems[:20], *([f"and {len(problems) - 20} more."] if len(problems) > 20 else [])]
            raise join_errors(WeightError, f"{self.path}: made for another model:", more)

    def of(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Importances [matrices or 1, columns] of a tensor, None where there is no entry."""
        values = self.entries.get(name)
        return None if values is None else values.view(-1, shape[-1])


def _lengths(shape: tuple[int, ...]) -> list[int]:
    """How many values an entry for a tensor of `shape` may have: one a column, or one a column of each matrix."""
    return list(dict.fromkeys([shape[-1] * (shape[0] if len(shape) == 3 else 1), shape[-1]]))


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of either format. Raises WeightError for a file that is none or is damaged."""
    if existing_path(path, "--imatrix", WeightError) is None:
        raise WeightError(f"--imatrix {path}: no such file. Check the path.")
    file = MappedFile(path)
    if bytes(file.buffer[:4]) == b"GGUF":
        entries = _read_gguf(file)
    else:
        entries = _read_dat(path, bytes(file.buffer))
    if not entries:
        raise WeightError(f"{path}: an importance matrix without an entry. {_AGAIN}")
    for name, values in entries.items():
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise WeightError(f"{path}: {name} has values that are NaN, infinite or below 0. {_AGAIN}")
    return Imatrix(path, entries)


def _read_gguf(file: MappedFile) -> dict[str, Tensor]:
    try:
        tensors, _ = parse(file)
    except KTransformersError as error:
        raise WeightError(f"{file.path}: no importance matrix can be read from it: {error}") from error
    entries = {}
    for name, info in tensors.items():
        base = name.removesuffix(_SUMS)
        if base == name:
            if not (name.endswith(_COUNTS) and name.removesuffix(_COUNTS) + _SUMS in tensors):
                raise WeightError(
                    f"{file.path}: tensor {name!r} belongs to no importance matrix. Give the file of llama-imatrix."
                )
            continue
        counts = tensors.get(base + _COUNTS)
        if counts is None or counts.type.name != "F32" or info.type.name != "F32":
            raise WeightError(f"{file.path}: {base} needs {_SUMS} and {_COUNTS} in F32. {_AGAIN}")
        each, sums = _floats(file, counts).view(-1, 1), _floats(file, info)
        if sums.numel() % len(each):
            raise WeightError(f"{file.path}: {base}: {sums.numel()} sums for {len(each)} matrices. {_AGAIN}")
        # An expert that no token reached: nothing is known, so all columns alike.
        means = torch.where(each > 0, sums.view(len(each), -1) / each, torch.ones(()))
        entries[base] = means.reshape(-1)
    return entries


def _floats(file: MappedFile, info) -> Tensor:
    return file.bytes[info.start : info.start + info.nbytes].clone().view(torch.float32)


def _read_dat(path: Path, data: bytes) -> dict[str, Tensor]:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise WeightError(f"{path}: no importance matrix, or a damaged one (at byte {at}). {_AGAIN}")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries: dict[str, Tensor] = {}
    for _ in range(number()):
        try:
            name = take(number()).decode()
        except UnicodeDecodeError as error:
            raise WeightError(f"{path}: no importance matrix, or a damaged one (a name). {_AGAIN}") from error
        calls, count = number(), number()
        if not name or name in entries or count < 1:
            raise WeightError(f"{path}: no importance matrix, or a damaged one (entry {name[:80]!r}). {_AGAIN}")
        values = torch.frombuffer(bytearray(take(4 * count)), dtype=torch.float32)
        entries[name] = values / calls if calls > 0 else values
    return entries
