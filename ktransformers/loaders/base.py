"""What both checkpoint formats have in common: a mapped file, and the questions one can ask a checkpoint.

Tensor data are never read here: `packed` is a view of the mapped file and the page cache is the only copy.
Peak memory of `tensor` is its result plus a few MiB.
"""

import contextlib
import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

import torch
from torch import Tensor

from ktransformers import env
from ktransformers.errors import WeightError, did_you_mean
from ktransformers.machine.system import memory
from ktransformers.quants.blocks import Packed, QuantType
from ktransformers.quants.scaled import ScaledType, ScaledWeight

if TYPE_CHECKING:
    from ktransformers.loaders.sources import ExpertWeights

# Python 3.11 does not name it; the value is Linux's on every architecture that torch has wheels for.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


_HUGE = 2 << 20
"""Bytes of a huge page, on x86-64 and on ARM64 with pages of 4 KiB."""

READ_BYTES = 64 << 20
"""Read at once into huge pages."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its checkpoint describes it; `shape` in torch order, `start` its byte offset in `file`.

    `fault`: why it cannot be used, where it was meant for a quantized weight and its parts do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType | ScaledType
    nbytes: int
    file: Path
    start: int
    fault: str = ""


@runtime_checkable
class WeightSource(Protocol):
    """What an operator gets as `gguf_loader`: weights by the model's names (`model.layers.3.mlp.gate.weight`).

    `ModelWeights` is one over a checkpoint of any format; tests and the simulator have others. A method that takes a
    name raises WeightError with the closest known one when there is no such weight. `prefix` is the name of an
    experts module. Letters: E experts, H hidden, I intermediate.
    """

    def names(self) -> list[str]:
        """Every tensor that can be delivered."""

    def has(self, name: str) -> bool:
        """Whether `name` is one of `names()`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `tensor(name)` has."""

    def infos(self, name: str) -> Sequence[TensorInfo]:
        """The stored tensors that `name` is made from; a source without files describes at least their `type`."""

    def quant_type(self, name: str) -> str:
        """The stored type: "Q4_K", or "Q4_K+Q6_K" where tensors of several types make one."""

    def methods(self, name: str) -> list[str]:
        """The ways in which parts of `name` are stored, as users call them: FP8, RAWINT4, LLAMAFILE."""

    def is_stored_as(self, name: str, method: str) -> bool:
        """Whether every part of `name` is stored in the way that users call `method`."""

    def nbytes(self, name: str) -> int:
        """Bytes of the stored tensors that `name` is made from."""

    def tensor(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, in memory of their own; `dtype` None is the stored float type, else float32."""

    def can_pack(self, name: str) -> bool:
        """Whether `packed(name)` can deliver."""

    def packed(self, name: str) -> Packed | ScaledWeight:
        """The stored bytes, without a copy where rows lie in the file as the model wants them."""

    def same(self, name: str, other: str) -> bool:
        """Whether two names may be one tensor: both have the same numbers, or one is not there."""

    def has_experts(self, prefix: str) -> bool:
        """Whether the routed experts of `prefix` can be delivered, packed or as tensors."""

    def experts_problem(self, prefix: str) -> str:
        """Why `experts(prefix)` cannot deliver packed rows, or ""."""

    def experts(self, prefix: str) -> "ExpertWeights":
        """The routed experts of `prefix`: E packed matrices each, gate and up [I, H], down [H, I], and biases."""


class MappedFile:
    """A file in memory without a copy, and its bytes as one uint8 tensor.

    Mapped private and writable, so torch sees ordinary memory and a stray write cannot reach the file;
    without reserving swap, so a file larger than memory maps too. It lives as long as a tensor made from it.
    With KT_HUGE_PAGES=1 the file is read into huge pages instead: slower to open and as large as the file from the
    start, but decoding walks fewer page tables; the page cache is told to forget what was read, so there is one copy.

    Raises WeightError when the file cannot be opened, is empty, is a git-lfs pointer instead of the data, or does not
    fit into the memory there is (KT_HUGE_PAGES only).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                head = file.read(20)
                if self.size and head != b"version https://git-":
                    self.buffer = _huge(file, path, self.size) if env.huge_pages() else _mapped(file, self.size)
                    self.bytes = torch.frombuffer(self.buffer, dtype=torch.uint8)
        except OSError as error:
            raise WeightError(f"{path}: cannot be read ({error}). Check the path and the permissions.") from error
        if not self.size:
            raise WeightError(f"{path}: the file is empty. Download it again.")
        if head == b"version https://git-":
            raise WeightError(f"{path}: holds a git-lfs pointer, not weights. Run `git lfs pull` in its folder.")


def _mapped(file: BinaryIO, size: int) -> memoryview:
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return memoryview(mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ | mmap.PROT_WRITE))


def _huge(file: BinaryIO, path: Path, size: int) -> memoryview:
    """The file's bytes in anonymous memory that starts at a huge page and asks for more of them."""
    _, free = memory()
    if size > free:
        raise WeightError(
            f"{path}: {size} bytes, but {free} bytes of memory are available. Unset KT_HUGE_PAGES to map the file."
        )
    room = mmap.mmap(-1, size + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    start = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % _HUGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones then
            room.madvise(mmap.MADV_HUGEPAGE, start, size)
    view, file_at = memoryview(room)[start : start + size], 0
    file.seek(0)
    while file_at < size:
        count = file.readinto(view[file_at : file_at + READ_BYTES])
        if not count:
            raise WeightError(f"{path}: ends after {file_at} of {size} bytes. Is it still being written?")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), file_at, count, os.POSIX_FADV_DONTNEED)
        file_at += count
    return view


class WeightFiles(ABC):
    """An open checkpoint, asked in its own tensor names. A context manager; `close` forgets the mappings,
    which last until the last tensor over them is gone, so closing never pulls memory from under a user."""

    format: str
    method = ""
    """What the checkpoint's config names as its `quant_method`, if anything."""
    passed_over = ""
    """A file of weights in the same folder that is not read, because another comes before it."""

    def __init__(self, files: list[MappedFile], tensors: dict[str, TensorInfo], metadata: dict) -> None:
        self.paths: list[Path] = [file.path for file in files]
        self.metadata = metadata
        self._bytes: dict[Path, Tensor] | None = {file.path: file.bytes for file in files}
        self._tensors = tensors

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Shape, type and place of a tensor. Raises WeightError with the closest name when there is none."""
        if name not in self._tensors:
            where = self.paths[0] if len(self.paths) == 1 else f"the {len(self.paths)} files of {self.paths[0].parent}"
            raise WeightError(f"No tensor {name!r} in {where}{did_you_mean(name, self._tensors)}.")
        return self._tensors[name]

    def packed(self, name: str) -> Packed | ScaledWeight:
        """The published bytes of a tensor, as a view of the mapped file."""
        info = self.info(name)
        if info.fault:
            raise WeightError(f"{name}: {info.fault}.")
        return Packed(self._view(info), info.type, info.shape)

    def _view(self, info: TensorInfo) -> Tensor:
        """The bytes of a stored tensor, uint8 [nbytes]."""
        if self._bytes is None:
            raise WeightError(f"{info.name}: {info.file} is closed. Ask while the checkpoint is open.")
        return self._bytes[info.file][info.start : info.start + info.nbytes]

    def tensor(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, in memory of their own; `dtype` None is the stored float type, else float32."""
        packed = self.packed(name)
        return packed.dequantize(dtype or packed.type.torch_dtype or torch.float32, device)

    def close(self) -> None:
        self._bytes = None

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> "WeightFiles":
        """Open one file, or the set it belongs to, or a folder that holds one set."""


def describe_folder(folder: Path, limit: int = 8) -> str:
    """What a folder holds, in one line, for an error message."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "it holds " + ", ".join(names[:limit]) + more


def check_ranges(path: Path, tensors: list[TensorInfo]) -> None:
    """Raise WeightError when two tensors of one file share bytes."""
    ordered = sorted((info for info in tensors if info.nbytes), key=lambda info: (info.start, info.nbytes))
    for before, after in pairwise(ordered):
        if after.start < before.start + before.nbytes:
            raise WeightError(
                f"{path}: tensors {before.name!r} (bytes {before.start} to {before.start + before.nbytes}) "
                f"and {after.name!r} (from {after.start}) overlap. The file is damaged; download it again."
            )
