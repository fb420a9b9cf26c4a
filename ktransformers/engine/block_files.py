"""Files of the prefix cache on disk: one a block of tokens, written whole or not at all, and never trusted.

    magic, uint32 length of the header, header (JSON), bytes of all parts, blake2b of everything before

The header says whose block it is ("model", "key", "parent", "ids" in hexadecimal) and how many bytes each part has
("parts"); what the parts are ("layers") is for who wrote them to know. A block of model M with key K is the file
M/K[:2]/K.block of the cache's folder. A file is written under another name and renamed, so a process that is killed
leaves no half of one. Nothing is synced: what a power cut leaves is found out by its checksum. No torch here.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktransformers.errors import KTransformersError, is_whole

try:
    import fcntl
except ImportError:  # not there on Windows
    fcntl = None

FORMAT = 1
"""Raised with every change of what a file holds or means."""
MAGIC = b"KTBLOCK\n"
SUFFIX, PART = ".block", ".part"
MOST_HEADER = 16 << 20
_HEAD = struct.Struct("<8sI")
_DIGEST = 32
_MODEL, _FOLDER, _FILE = (re.compile(p) for p in (r"(?:[0-9a-f]{2}){1,64}", r"[0-9a-f]{2}", r"[0-9a-f]{64}\.block"))

Buffer = memoryview | bytes | bytearray
Header = dict[str, Any]


class BlockDamaged(KTransformersError):
    """A file is no block, or not the one that its name says."""


def block_key(parent: bytes, ids: bytes) -> bytes:
    """The key of the block of tokens `ids` (int64 each) that follows the block `parent`."""
    return hashlib.blake2b(parent + ids, digest_size=_DIGEST).digest()


def path_of(folder: Path, model: str, key: bytes) -> Path:
    """Where the block `key` of `model`, in hexadecimal, is."""
    name = key.hex()
    return folder / model / name[:2] / f"{name}{SUFFIX}"


# --- writing --------------------------------------------------------------------------------------------


def write(path: Path, header: Header, parts: Sequence[Buffer]) -> int:
    """Write a block in one step; its bytes on disk. "format" and "parts" of the header are filled in. Raises OSError.

    It and the folders of the cache are for their owner alone: prompts can be read from it.
    """
    text = json.dumps({"format": FORMAT, **header, "parts": [len(part) for part in parts]}).encode()
    whole = [_HEAD.pack(MAGIC, len(text)), text, *parts]
    try:
        return _write_once(path, whole)
    except FileNotFoundError:  # somebody cleared the folder, or took the file for a leftover before it was locked
        return _write_once(path, whole)


def _write_once(path: Path, whole: Sequence[Buffer]) -> int:
    path.parents[2].parent.mkdir(parents=True, exist_ok=True)
    for folder in (path.parents[2], path.parents[1], path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _lock(file)  # until it is renamed nobody takes it for what a dead process left
        size = _write_all(file, whole)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(file)
    return size


def _write_all(file: int, parts: Sequence[Buffer]) -> int:
    digest, size = hashlib.blake2b(digest_size=_DIGEST), 0
    for part in parts:
        digest.update(part)
        size += _write(file, part)
    return size + _write(file, digest.digest())


def _write(file: int, data: Buffer) -> int:
    left = memoryview(data)
    while len(left):
        left = left[os.write(file, left) :]
    return len(data)


def _lock(file: int) -> bool:
    """Whether nobody else has the file locked; it is locked from now on. A lock dies with its process."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# --- reading --------------------------------------------------------------------------------------------


def read(path: Path, allocate: Callable[[Header], Sequence[Any]]) -> Header:
    """The header of a block, and its parts into the writable buffers that `allocate` gives for it.

    Raises BlockDamaged for anything but a whole block of this format under its own name, and OSError.
    """
    with open(path, "rb", buffering=0) as file:
        header, head = _header(file, path)
        digest, buffers = hashlib.blake2b(head, digest_size=_DIGEST), allocate(header)
        if [len(buffer) for buffer in buffers] != header["parts"]:
            raise BlockDamaged(f"{path}: its parts are not as long as the model's are.")
        for buffer in buffers:
            _fill(file, memoryview(buffer), path)
            digest.update(buffer)
        if file.read(_DIGEST) != digest.digest():
            raise BlockDamaged(f"{path}: its checksum is wrong.")
    return header


def read_header(path: Path) -> Header:
    """The header of a block. Raises as `read`, which looks at the rest too."""
    with open(path, "rb", buffering=0) as file:
        return _header(file, path)[0]


def verify(path: Path) -> Header:
    """Read all of a block. Raises BlockDamaged and OSError."""

    def scratch(header: Header) -> list[memoryview]:
        room = memoryview(bytearray(max(header["parts"], default=0)))
        return [room[:size] for size in header["parts"]]

    return read(path, scratch)


def _header(file: Any, path: Path) -> tuple[Header, bytes]:
    """The header, and the file's bytes up to its end."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_HEAD.size)
    if len(start) < _HEAD.size or not start.startswith(MAGIC):
        raise BlockDamaged(f"{path}: it does not begin as a block.")
    length = _HEAD.unpack(start)[1]
    if length > min(size, MOST_HEADER):
        raise BlockDamaged(f"{path}: it ends within its header.")
    text = bytearray(length)
    _fill(file, memoryview(text), path)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BlockDamaged(f"{path}: its header is no JSON.") from error
    problem = _problem(header, path)
    if problem:
        raise BlockDamaged(f"{path}: {problem}.")
    if _HEAD.size + length + sum(header["parts"]) + _DIGEST != size:
        raise BlockDamaged(f"{path}: it is not as long as its header says.")
    return header, start + text


def _problem(header: Any, path: Path) -> str:
    """Why a header is not that of the block which the path names; "" where it is."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        return f"it is not of format {FORMAT}"
    try:
        parent, ids = (bytes.fromhex(header[name]) for name in ("parent", "ids"))
        key = block_key(parent, ids).hex()
    except (KeyError, TypeError, ValueError):
        return "it does not say what tokens it is for"
    if header.get("key") != key or path.name != f"{key}{SUFFIX}" or header.get("model") != path.parent.parent.name:
        return "it is another block or another model's than its name says"
    parts = header.get("parts")
    if not isinstance(parts, list) or not all(is_whole(size, 0, 1 << 48) for size in parts):
        return "it does not say how long its parts are"
    return ""


def _fill(file: Any, buffer: memoryview, path: Path) -> None:
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise BlockDamaged(f"{path}: it ends too early.")
        buffer = buffer[count:]


# --- the folder -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockFile:
    """A file of a block, by its name. `used`: when it was used last, in nanoseconds since 1970."""

    path: Path
    model: str
    size: int
    used: int


def block_files(folder: Path) -> Iterator[BlockFile]:
    """Every block in a cache's folder; what is no block by its place and name is passed over."""
    for entry, model in _entries(folder):
        if _FILE.fullmatch(entry.name):
            with contextlib.suppress(OSError):  # somebody deletes
                stat = entry.stat(follow_symlinks=False)
                yield BlockFile(Path(entry.path), model, stat.st_size, stat.st_mtime_ns)


def remove_leftovers(folder: Path) -> int:
    """Remove what processes that died while they wrote left; how many files that were."""
    removed = 0
    for entry, _ in _entries(folder):
        if entry.name.startswith(".") and entry.name.endswith(PART):
            with contextlib.suppress(OSError):
                removed += _remove_if_left(entry.path)
    return removed


def _remove_if_left(path: str) -> bool:
    file = os.open(path, os.O_RDWR)
    try:
        left = _lock(file)
        if left:
            os.unlink(path)
        return left
    finally:
        os.close(file)


def _entries(folder: Path) -> Iterator[tuple[os.DirEntry, str]]:
    """All that is in folders of blocks, with the model that they are of."""
    for model in _scanned(folder):
        if _MODEL.fullmatch(model.name):
            for part in _scanned(model.path):
                if _FOLDER.fullmatch(part.name):
                    yield from ((entry, model.name) for entry in _scanned(part.path))


def _scanned(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # not there, not a folder, not ours
        return []
