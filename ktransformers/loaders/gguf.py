"""GGUF files, version 2 and 3, single and split: our own parser over a mapped file.

Own, because a vocabulary of 150k tokens must open in a fraction of a second, and because a header is hostile
until checked: every count, length, offset and shape is bounded by the file's size before it is used.
It knows bytes and tensor names of the file; what they mean to a model is for bind_gguf.py.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from ktransformers.errors import UnsupportedError, WeightError, is_whole, join_errors
from ktransformers.loaders.base import MappedFile, TensorInfo, WeightFiles, check_ranges, describe_folder
from ktransformers.quants.blocks import BY_ID, REMOVED

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65535  # the format's limit for a key; ggml itself allows 63 bytes in a tensor's name
_MAX_NESTING = 4  # no published file nests arrays at all
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Vision towers and calibration data that lie beside the weights.
_COMPANION = re.compile(r"^mmproj|imatrix\.gguf$", re.IGNORECASE)


class GGUFArray(Sequence):
    """An array of the metadata, decoded when first looked at: a vocabulary costs nothing until asked for."""

    def __init__(self, cursor: "_Cursor", kind: int, count: int) -> None:
        self._source: tuple[_Cursor, int, int] | None = (cursor, kind, cursor.at)
        self._count = count
        self._items: tuple = ()

    def __len__(self) -> int:
        return self._count

    def _decoded(self) -> tuple:
        if self._source is not None:
            cursor, kind, at = self._source
            self._items = tuple(cursor.moved(at).elements(kind, self._count))
            self._source = None
        return self._items

    def __getitem__(self, index):
        return self._decoded()[index]

    def __iter__(self) -> Iterator:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"GGUFArray({self._count} items)"


class _Cursor:
    """A reading position in a mapped file. Every read is checked against the end of the file."""

    def __init__(self, file: MappedFile, at: int = 0) -> None:
        self.file, self.buffer, self.size, self.at = file, file.buffer, file.size, at

    def moved(self, at: int) -> "_Cursor":
        return _Cursor(self.file, at)

    def fail(self, what: str) -> WeightError:
        return WeightError(f"{self.file.path}: {what}. The file is damaged or cut short; download it again.")

    def need(self, count: int, size: int, what: str) -> None:
        """Check that `count` things of at least `size` bytes can follow, before anything loops over them."""
        if count * size > self.size - self.at:
            raise self.fail(
                f"the header announces {count} {what}, more than {self.size} bytes of file can hold"
            )

    def number(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        self.need(1, size, f"value of {size} bytes at byte {self.at}")
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += size
        return value

    def raw(self, what: str) -> bytes:
        length = self.number("Q")
        if length > self.size - self.at:
            raise self.fail(
                f"{what} at byte {self.at} claims a length of {length} bytes, beyond the end of the file"
            )
        self.at += length
        return bytes(self.buffer[self.at - length : self.at])

    def name(self, what: str) -> str:
        text = self.raw(what)
        if not 0 < len(text) <= _MAX_NAME:
            raise self.fail(
                f"{what} before byte {self.at} has a length of {len(text)} bytes, expected 1 to {_MAX_NAME}"
            )
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} before byte {self.at} is not UTF-8 ({error.reason})") from error

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings. The one loop that a large vocabulary pays for: it does nothing else."""
        buffer, at, size = self.buffer, self.at, self.size
        read = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + read(buffer, at)[0]
        except (struct.error, OverflowError) as error:
            raise self.fail(
                f"an array of {count} strings at byte {self.at} runs beyond the end of the file"
            ) from error
        if at > size:
            raise self.fail(f"an array of {count} strings at byte {self.at} runs beyond the end of the file")
        self.at = at

    def array(self, depth: int) -> GGUFArray:
        kind, count = self.number("I"), self.number("Q")
        start = self.at
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            self.need(count, size, "array elements")
            self.at += count * size
        elif kind == _STRING:
            self.need(count, 8, "strings")
            self.skip_strings(count)
        elif kind == _ARRAY and depth < _MAX_NESTING:
            self.need(count, 12, "nested arrays")
            for _ in range(count):
                self.array(depth + 1)
        else:
            what = (
                f"arrays nested more than {_MAX_NESTING} deep"
                if kind == _ARRAY
                else f"an array of type {kind}"
            )
            raise self.fail(f"{what} at byte {start}, which GGUF does not have")
        return GGUFArray(self.moved(start), kind, count)

    def elements(self, kind: int, count: int) -> Iterator:
        if kind in _SCALARS:
            yield from struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.buffer, self.at)
            return
        for _ in range(count):
            yield self.value(kind)

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.raw("a string").decode("utf-8", errors="replace")
        if kind == _ARRAY:
            return self.array(0)
        raise self.fail(f"a metadata value at byte {self.at} has type {kind}, which GGUF does not have")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and the two counts: (tensors, metadata entries)."""
    path, magic = cursor.file.path, bytes(cursor.buffer[:4])
    if magic != b"GGUF":
        raise WeightError(
            f"{path}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'. Check the path."
        )
    cursor.at = 4
    version = cursor.number("I")
    if version in (2 << 24, 3 << 24):
        raise UnsupportedError(
            f"{path}: a big-endian GGUF file; only little-endian ones are read. Convert it with "
            f"gguf-convert-endian of the gguf package."
        )
    if version == 1:
        raise UnsupportedError(
            f"{path}: GGUF version 1; versions 2 and 3 are read. Download a newer conversion."
        )
    if version not in (2, 3):
        raise UnsupportedError(
            f"{path}: GGUF version {version}; versions 2 and 3 are read. Update KTransformers."
        )
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    cursor.need(entries, 13, "metadata entries")
    cursor.need(tensors, 32, "tensors")
    return tensors, entries


def _read_metadata(cursor: _Cursor, entries: int) -> dict:
    metadata: dict = {}
    for _ in range(entries):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def metadata_entries(file: MappedFile) -> Iterator[tuple[str, bytes]]:
    """Keys of a file's metadata, each with the bytes of its whole entry, for who writes them again."""
    cursor = _Cursor(file)
    _, entries = _read_counts(cursor)
    for _ in range(entries):
        start = cursor.at
        key = cursor.name("a metadata key")
        cursor.value(cursor.number("I"))
        yield key, bytes(cursor.buffer[start : cursor.at])


def _read_alignment(cursor: _Cursor, metadata: dict) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not is_whole(alignment, 1, 1 << 20) or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
    return alignment


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's (name, shape in torch order, type id, offset in the data section)."""
    name = cursor.name("a tensor name")
    dims = cursor.number("I")
    if not 1 <= dims <= 4:
        raise cursor.fail(f"tensor {name!r} has {dims} dimensions, expected 1 to 4")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    if math.prod(shape) == 0 or math.prod(shape) >= 1 << 60:
        raise cursor.fail(f"tensor {name!r} has the impossible shape {list(shape)}")
    return name, shape, cursor.number("I"), cursor.number("Q")


def _checked_type(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int):
    if type_id not in BY_ID:
        what = REMOVED.get(type_id)
        known = (
            f"type {what}, which llama.cpp withdrew"
            if what
            else f"type id {type_id}, which this version does not know"
        )
        raise UnsupportedError(
            f"{cursor.file.path}: tensor {name!r} has {known}. Use another quantization of the model."
        )
    kind = BY_ID[type_id]
    if shape[-1] % kind.block:
        raise cursor.fail(
            f"tensor {name!r} has rows of {shape[-1]}, type {kind.name} needs a multiple of {kind.block}"
        )
    return kind


def parse(file: MappedFile) -> tuple[dict[str, TensorInfo], dict]:
    """Read and check one file's header: (tensors by name, metadata).

    Raises WeightError for a damaged file and UnsupportedError for versions and types not known here.
    """
    cursor = _Cursor(file)
    count, entries = _read_counts(cursor)
    metadata = _read_metadata(cursor, entries)
    alignment = _read_alignment(cursor, metadata)
    cursor.need(count, 32, "tensors")
    raw = [_read_tensor(cursor) for _ in range(count)]
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in raw:
        kind = _checked_type(cursor, name, shape, type_id)
        info = TensorInfo(name, shape, kind, kind.packed_bytes(shape), file.path, data + offset)
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} occurs twice")
        if offset % alignment:
            raise cursor.fail(
                f"tensor {name!r} starts at offset {offset}, not a multiple of the alignment {alignment}"
            )
        if info.start + info.nbytes > file.size:
            raise cursor.fail(
                f"tensor {name!r} ends at byte {info.start + info.nbytes}, the file has {file.size}"
            )
        tensors[name] = info
    check_ranges(file.path, list(tensors.values()))
    return tensors, metadata


class GGUFFiles(WeightFiles):
    """A GGUF checkpoint: one file, or all files of a split set. `metadata` is the first file's."""

    format = "gguf"

    @classmethod
    def open(cls, path: Path) -> "GGUFFiles":
        paths = _shards(_pick(path) if path.is_dir() else path)
        files = [MappedFile(p) for p in paths]
        parsed = [parse(file) for file in files]
        _check_split(paths, parsed)
        tensors: dict[str, TensorInfo] = {}
        for shard, _ in parsed:
            for name, info in shard.items():
                if name in tensors:
                    raise WeightError(
                        f"Tensor {name!r} is in {tensors[name].file} and in {info.file}. "
                        "The files are not of one set; download them again."
                    )
                tensors[name] = info
        return cls(files, tensors, parsed[0][1])


def _pick(folder: Path) -> Path:
    """The one GGUF file, or first shard, of a folder. Raises WeightError when there are none or several."""
    every = sorted(folder.glob("*.gguf"))
    found = [p for p in every if not _COMPANION.search(p.name)] or every
    models: dict[object, Path] = {}
    for path in found:
        shard = _SHARD.fullmatch(path.name)
        models.setdefault((shard["stem"], shard["count"]) if shard else path.name, path)
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        names = ", ".join(p.name for p in models.values())
        raise WeightError(f"{folder}: holds {len(models)} GGUF models ({names}). Give the path of one file.")
    raise WeightError(f"{folder}: no .gguf file in it; {describe_folder(folder)}. Give the path of one file.")


def _shards(path: Path) -> list[Path]:
    """All files of the set that `path` belongs to, in order. Raises WeightError naming each missing one."""
    shard = _SHARD.fullmatch(path.name)
    if not shard:
        return [path]
    count = int(shard["count"])
    if not 1 <= int(shard["number"]) <= count:
        raise WeightError(
            f"{path}: shard {shard['number']} of {count}. Rename the file to the name it was published by."
        )
    paths = [path.with_name(f"{shard['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        shown = missing[:8] + ([f"and {len(missing) - 8} more"] if len(missing) > 8 else [])
        raise join_errors(
            WeightError,
            f"{path.parent}: {len(missing)} of {count} files of the split model are missing. "
            "Download them into the same folder:",
            shown,
        )
    return paths


def _check_split(paths: list[Path], parsed: list[tuple[dict, dict]]) -> None:
    """Check what the files of a set say about themselves against their names; they may say nothing."""
    problems = []
    for number, (path, (_, metadata)) in enumerate(zip(paths, parsed, strict=True)):
        for key, expected in (("split.no", number), ("split.count", len(paths))):
            found = metadata.get(key, expected)
            if found != expected and not (key == "split.count" and found == 0 and len(paths) == 1):
                problems.append(f"{path.name}: {key} is {found!r}, expected {expected}")
    total = sum(len(tensors) for tensors, _ in parsed)
    announced = parsed[0][1].get("split.tensors.count", total)
    if announced != total:
        problems.append(f"the set announces {announced} tensors and holds {total}")
    if problems:
        raise join_errors(
            WeightError,
            f"{paths[0]}: the files do not form one split model. Download the set again, "
            "and keep the published file names (NAME-00001-of-000NN.gguf):",
            problems,
        )
