"""A GGUF file written again with other tensors: metadata byte for byte, tensors as they come.

The metadata are not decoded and encoded again: a vocabulary stays what it was, whatever is in it.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from ktransformers.loaders.base import MappedFile
from ktransformers.loaders.gguf import metadata_entries
from ktransformers.loaders.writing import Written

_ALIGNMENT = 32
_OF_THE_SET = ("split.", "general.alignment")
"""Metadata of one file among several, or of how tensors lie."""
_OF_TYPES = ("general.file_type", "quantize.imatrix.")
"""Of how they are stored."""


def rewrite(
    source: Path, out: Path, tensors: list[Written], file_type: int | None, done: Callable[[Written], None]
) -> None:
    """Write `tensors` to `out` with the metadata of `source`, the first of its set; `done` is called after each.
    `file_type` None keeps the source's."""
    kept = list(_kept(source, file_type))
    infos, at = [], 0
    for tensor in tensors:
        name, dims = tensor.name.encode(), tensor.shape[::-1]
        form = f"<Q{len(name)}sI{len(dims)}QIQ"
        infos.append(struct.pack(form, len(name), name, len(dims), *dims, tensor.type.id, at))
        at += _aligned(tensor.nbytes)
    with open(out, "wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(kept)))
        for part in (*kept, *infos):
            file.write(part)
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for tensor in tensors:
            tensor.write_to(file)
            file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))
            done(tensor)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _kept(source: Path, file_type: int | None) -> Iterator[bytes]:
    for key, entry in metadata_entries(MappedFile(source)):
        if not key.startswith(_OF_THE_SET if file_type is None else (*_OF_THE_SET, *_OF_TYPES)):
            yield entry
    if file_type is not None:
        key = b"general.file_type"
        yield struct.pack(f"<Q{len(key)}sII", len(key), key, 4, file_type)
