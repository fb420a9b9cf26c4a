"""Tensors on their way to a file, bytes in pieces, so that one matrix at a time is in memory; and safetensors files."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ktransformers.errors import WeightError
from ktransformers.quants.blocks import QuantType


@dataclass(frozen=True)
class Written:
    """One tensor to write. `pieces` yields its bytes, uint8, in order."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.type.packed_bytes(self.shape)

    def write_to(self, file) -> None:
        """Write all bytes. Raises OSError, and WeightError where pieces are not the whole."""
        count = 0
        for piece in self.pieces():
            file.write(memoryview(piece.contiguous().view(-1).numpy()))
            count += piece.numel()
        if count != self.nbytes:
            raise WeightError(f"{self.name}: {count} bytes to write, expected {self.nbytes}.")


def write_safetensors(path: Path, tensors: Iterable[Written], done: Callable[[Written], None]) -> None:
    """Write a safetensors file, tensor by tensor; `done` is called after each."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.type.name, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8, as the library writes them
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            tensor.write_to(file)
            done(tensor)
