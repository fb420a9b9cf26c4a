"""Safetensors checkpoints: one file, or shards by index or by name. Our own header check over a mapped file.

Own, because experts are computed from the mapped bytes, which the safetensors library does not hand out, and
because an error must name the file, the tensor and the next step.

The format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

from ktransformers.errors import WeightError, did_you_mean, is_whole, join_errors
from ktransformers.loaders.base import MappedFile, TensorInfo, WeightFiles, check_ranges, describe_folder
from ktransformers.loaders.schemes import ScaledInfo, combine, read_config, read_scheme
from ktransformers.quants.blocks import QUANT_TYPES, Packed, QuantType
from ktransformers.quants.scaled import ScaledWeight

_MAX_HEADER = 100_000_000  # the library's own limit, in bytes
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

TYPES: dict[str, QuantType] = {
    name: QUANT_TYPES[name] for name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
}
TYPES |= {
    name: QuantType(name, -1, block, nbytes)
    for name, block, nbytes in (
        ("BOOL", 1, 1),
        ("U8", 1, 1),
        ("U16", 1, 2),
        ("U32", 1, 4),
        ("U64", 1, 8),
        ("C64", 1, 8),
        ("F8_E4M3", 1, 1),
        ("F8_E5M2", 1, 1),
        ("F8_E8M0", 1, 1),
        ("F8_E4M3FNUZ", 1, 1),
        ("F8_E5M2FNUZ", 1, 1),
        ("F4", 2, 1),
        ("F6_E2M3", 4, 3),
        ("F6_E3M2", 4, 3),
    )
}
"""Every dtype of the format by name and size. On their own F32, F16 and BF16 are computed; what others mean together,
schemes.py says."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys are all different; json keeps the last of two silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _parse_json(text: bytes, path: Path, what: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightError(
            f"{path}: {what} is not valid JSON ({error}). The file is damaged; download it again."
        ) from error
    if not isinstance(value, dict):
        raise WeightError(
            f"{path}: {what} is a JSON {type(value).__name__}, expected an object. Download it again."
        )
    return value


def _whole(value: object) -> bool:
    return is_whole(value, 0, (1 << 63) - 1)


def _entry(path: Path, name: str, entry: object, data: int, size: int) -> TensorInfo:
    """Check one tensor's entry of the header. `data` is where the data section starts, `size` the file's."""

    def fail(what: str) -> WeightError:
        return WeightError(
            f"{path}: tensor {name!r} {what}. The file is damaged or cut short; download it again."
        )

    if not isinstance(entry, dict):
        raise fail("has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise WeightError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, which safetensors does not have"
            f"{did_you_mean(str(dtype), TYPES)}. Update KTransformers if the file is newer than it."
        )
    if not isinstance(shape, list) or not all(map(_whole, shape)) or math.prod(shape) >= 1 << 60:
        raise fail(f"has shape {shape!r:.80}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise fail(f"has data_offsets {offsets!r:.80}, expected [start, end]")
    start, end = offsets
    if start > end or data + end > size:
        raise fail(f"has bytes {start} to {end} of a data section of {size - data}")
    kind, elements = TYPES[dtype], math.prod(shape)
    if elements * kind.nbytes != (end - start) * kind.block:
        raise fail(
            f"of dtype {dtype} and shape {shape} has {end - start} bytes, "
            f"expected {elements * kind.nbytes // kind.block}"
        )
    return TensorInfo(name, tuple(shape), kind, end - start, path, data + start)


def parse(file: MappedFile) -> tuple[dict[str, TensorInfo], dict]:
    """Read and check one file's header: (tensors by name, metadata).

    Raises WeightError naming the tensor for offsets out of range, overlapping, or not covering the data.
    """
    path = file.path
    length = struct.unpack_from("<Q", file.buffer)[0] if file.size >= 8 else 0
    if not 2 <= length <= min(file.size - 8, _MAX_HEADER):
        raise WeightError(
            f"{path}: a header of {length} bytes in a file of {file.size}: not a safetensors file, or cut "
            "short. Check the path, or download it again."
        )
    header = _parse_json(bytes(file.buffer[8 : 8 + length]), path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightError(f"{path}: __metadata__ is not an object. The file is damaged; download it again.")
    data = 8 + length
    tensors = {name: _entry(path, name, entry, data, file.size) for name, entry in header.items()}
    check_ranges(path, list(tensors.values()))
    covered = sum(info.nbytes for info in tensors.values())
    if covered != file.size - data:
        raise WeightError(
            f"{path}: tensors cover {covered} of {file.size - data} bytes of data. The file is damaged or "
            "was not written completely; download it again."
        )
    return tensors, metadata


class SafetensorsFiles(WeightFiles):
    """A safetensors checkpoint: one file, or all shards of a model. `metadata` is the first file's.

    A quantized weight is one tensor here, under the name it has in an unquantized checkpoint; `info` and `packed`
    know the parts it is made from too, by their own names.
    """

    format = "safetensors"

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFiles":
        paths, weight_map = _find(path)
        files = [MappedFile(p) for p in paths]
        stored: dict[str, TensorInfo] = {}
        metadata: dict = {}
        for file in files:
            shard, metadata_here = parse(file)
            metadata = metadata or metadata_here
            for name, info in shard.items():
                _place(stored, info, weight_map.get(name))
        _check_index(paths, stored, weight_map)
        opened = cls(files, stored, metadata)
        opened.passed_over = _passed_over(path, paths) if path.is_dir() else ""
        opened._stored = stored
        scheme = read_scheme(paths[0].parent)
        opened.method = scheme.method
        opened._tensors = combine(stored, scheme, lambda name: bytes(opened._view(stored[name]).numpy()))
        return opened

    def info(self, name: str) -> TensorInfo:
        return self._stored[name] if name not in self._tensors and name in self._stored else super().info(name)

    def packed(self, name: str) -> Packed | ScaledWeight:
        info = self.info(name)
        return self._scaled(info) if isinstance(info, ScaledInfo) else super().packed(name)

    def _scaled(self, info: ScaledInfo) -> ScaledWeight:
        """A weight of codes and companions as views of the mapped files."""
        try:
            self._require_zeros(info.absent_if_zero)
            lead, lines = info.shape[:-2], info.type.lines(*info.shape[-2:])
            return ScaledWeight(
                info.type, info.shape, self._view(info.codes).view(*lead, *lines), self._matrix(info.scales, info),
                info.scale_type, info.scale_rows, info.scale_cols,
                zeros=self._matrix(info.zeros, info), zero_bias=info.zero_bias,
                order=self._order(info), global_scale=self._factor(info),
            )  # fmt: skip
        except WeightError as error:
            raise WeightError(f"{info.name}: {error}") from error

    def _matrix(self, part: TensorInfo | None, of: ScaledInfo) -> Tensor | None:
        """The bytes of scales or zeros, uint8 [(E,) lines, bytes]; a vector or a number is a column."""
        if part is None:
            return None
        lead = of.shape[:-2]
        lines = part.shape[-2] if len(part.shape) >= 2 else math.ceil(of.shape[-2] / of.scale_rows)
        return self._view(part).view(*lead, lines, -1)

    def _order(self, info: ScaledInfo) -> Tensor | None:
        """The group of each column, or None where columns lie in the order of their groups.

        Where the config promises that, only the beginning is looked at: it is where another order would show.
        """
        if info.order is None:
            return None
        view = self._view(info.order)
        order = (view if view.data_ptr() % 4 == 0 else view.clone()).view(torch.int32)
        looked_at = order[:_PAGE] if info.trivial_order else order
        simple = torch.arange(len(looked_at), dtype=torch.int32, device="cpu") // info.scale_cols
        unused = bool((looked_at == -1).all())  # as compressed-tensors writes it
        same_groups = math.ceil(info.shape[-1] / info.scale_cols) == self._groups(info)
        return None if same_groups and (unused or torch.equal(looked_at, simple)) else order

    def _groups(self, info: ScaledInfo) -> int:
        return info.scales.shape[-1] if info.type.layout == "rows" else info.scales.shape[-2]

    def _factor(self, info: ScaledInfo) -> float:
        if info.factor is None:
            return 1.0
        factor = self._view(info.factor).clone().view(torch.float32).item()
        if not math.isfinite(factor) or factor == 0:
            raise WeightError(f"{info.factor.name} is {factor}, expected a finite number other than 0.")
        return 1.0 / factor if info.divides else factor

    def _require_zeros(self, part: TensorInfo | None) -> None:
        if part is not None and bool(self._view(part).any()):
            raise WeightError(
                f"{part.name} has zero points other than 0, which are not computed for these codes; expected none. "
                "Use a checkpoint with symmetric weights."
            )


_PAGE = 1024  # columns whose groups fill one page of a file


def _place(tensors: dict[str, TensorInfo], info: TensorInfo, chosen: str | None) -> None:
    """Add a shard's tensor; of two with one name the file `chosen` by the index counts."""
    other = tensors.get(info.name)
    if other is not None and chosen not in (info.file.name, other.file.name):
        raise WeightError(
            f"Tensor {info.name!r} is in {other.file} and in {info.file}, and no index says which counts. "
            "Keep the files of one model in a folder."
        )
    if other is None or chosen == info.file.name:
        tensors[info.name] = info


def _check_index(paths: list[Path], tensors: dict[str, TensorInfo], weight_map: dict[str, str]) -> None:
    problems = []
    for name, file in weight_map.items():
        if name not in tensors:
            problems.append(
                f"{name}: the index places it in {file}, which does not hold it{did_you_mean(name, tensors)}"
            )
        elif tensors[name].file.name != file:
            problems.append(f"{name}: the index places it in {file}, it is in {tensors[name].file.name}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise join_errors(
            WeightError,
            f"{paths[0].parent}: the index and the files do not agree. Download both again:",
            shown,
        )


def _find(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of the checkpoint at `path`, and the index's map from tensor to file name, if any."""
    if path.name.endswith(_INDEX):
        return _by_index(path)
    if path.is_file():
        shard = _SHARD.fullmatch(path.name)
        if not shard:
            return [path], {}
        index = path.with_name(shard["stem"] + _INDEX)
        return _by_index(index) if index.is_file() else (_by_name(path, shard), {})
    return _in_folder(path)


def _in_folder(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder that count: those that transformers reads, where it would read any.

    That is what the config names, else model.safetensors, else model.safetensors.index.json; whatever lies beside
    them (other layouts, variants, adapters) is not read. Of folders that transformers refuses, these are read too:
    shards model-0000i-of-0000n without their index, one index of another name, files without any.
    """
    for name in (*_named_by_config(path), "model.safetensors", "model" + _INDEX):
        if _is_file(path / name):
            return _by_index(path / name) if name.endswith(_INDEX) else ([path / name], {})
    if shard := next((found for p in sorted(path.glob("model-*")) if (found := _SHARD.fullmatch(p.name))), None):
        return _by_name(path / shard[0], shard), {}
    indexes = sorted(path.glob("*" + _INDEX))
    if len(indexes) == 1:
        return _by_index(indexes[0])
    if indexes:
        names = ", ".join(p.name for p in indexes)
        raise WeightError(f"{path}: holds several indexes ({names}). Give the path of one of them.")
    found = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not found:
        raise WeightError(
            f"{path}: no .safetensors file in it; {describe_folder(path)}. Give the folder of the weights."
        )
    shard = _SHARD.fullmatch(found[0].name)
    return (_by_name(found[0], shard) if shard else found), {}


def _named_by_config(folder: Path) -> list[str]:
    """The file or index that config.json names, if it names one (`transformers_weights`)."""
    config = folder / "config.json"
    if (name := (read_config(config) or {}).get("transformers_weights")) is None:
        return []
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", _INDEX)):
        raise WeightError(
            f"{config}: transformers_weights is {name!r:.80}, expected the name of a .safetensors file or of its index "
            "in the same folder. Correct it, or remove it."
        )
    _require([folder / name], folder)
    return [name]


def _passed_over(folder: Path, read: list[Path]) -> str:
    """The index, or else the weights, of a folder that are not among the files `read` of it."""
    names = {path.name for path in read}
    files = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in names]
    indexes = [path.name for path in sorted(folder.glob("*" + _INDEX))] if files else []
    return next(iter(indexes or files), "")


def _by_name(path: Path, shard: re.Match) -> list[Path]:
    count = int(shard["count"])
    if not 1 <= int(shard["number"]) <= count:
        raise WeightError(
            f"{path}: shard {shard['number']} of {count}. Rename the file to the name it was published by."
        )
    paths = [
        path.with_name(f"{shard['stem']}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)
    ]
    _require(paths, path.parent)
    return paths


def _by_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        text = index.read_bytes()
    except OSError as error:
        raise WeightError(
            f"{index}: cannot be read ({error}). Check the path and the permissions."
        ) from error
    weight_map = _parse_json(text, index, "the index").get("weight_map")
    plain = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not plain or not weight_map:
        raise WeightError(
            f"{index}: weight_map is {weight_map!r:.60}, expected an object of file names. Download it again."
        )
    outside = sorted(
        file for file in set(weight_map.values()) if Path(file).name != file or file in ("", ".", "..")
    )
    if outside:
        raise WeightError(
            f"{index}: names {outside[0]!r}, which is not a file of its folder. Do not use this checkpoint."
        )
    paths = [index.with_name(file) for file in sorted(set(weight_map.values()))]
    _require(paths, index.parent)
    return paths, weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False


def _require(paths: list[Path], folder: Path) -> None:
    missing = [p.name for p in paths if not _is_file(p)]
    if missing:
        shown = missing[:8] + ([f"and {len(missing) - 8} more"] if len(missing) > 8 else [])
        raise join_errors(
            WeightError,
            f"{folder}: {len(missing)} of {len(paths)} weight files are missing. Download them:",
            shown,
        )
