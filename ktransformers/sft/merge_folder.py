"""A folder of safetensors with an adapter merged in, of a folder or of a GGUF file."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError, join_errors
from ktransformers.gguf_files import write
from ktransformers.loaders import gguf_names
from ktransformers.loaders.base import TensorInfo
from ktransformers.loaders.lora import LowRank, Place
from ktransformers.loaders.sources import (
    ModelTransposed,
    Plain,
    RowsInTurn,
    Source,
    Stacked,
    StackedColumns,
    StoredTransposed,
    TransposedRows,
)
from ktransformers.loaders.writing import Written, write_safetensors
from ktransformers.quants.blocks import QUANT_TYPES, QuantType
from ktransformers.quants.scaled import ScaledType
from ktransformers.sft.merge import FLOATS, Merging, by_type
from ktransformers.sft.tally import numbers

Matrix = Callable[[int], Tensor]
"""Of a stack of matrices the one of that number, or the one matrix there is."""

_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".onnx")
_OF_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


# --- of a folder --------------------------------------------------------------------------------------------


def from_folder(merging: Merging) -> dict[str, Any]:
    """Files and tensors of the same names; quantized ones become floats."""
    changes, whole = _edits(merging)
    turned = {name for name in merging.weights.names() for source in [merging.weights.source(name)]
              if isinstance(source, ModelTransposed) for name in source.names}  # fmt: skip
    files: dict[str, list[Written]] = {}
    quantized = False
    for name in merging.files.names():
        info = merging.files.info(name)
        quantized |= isinstance(info.type, ScaledType)
        one = _stored(merging, info, name in turned, changes.get(name), whole.get(name))
        files.setdefault(info.file.name, []).append(one)
    if quantized:
        _note_quantized(merging)
    return _write(merging, files, lambda folder: _copy_rest(merging, folder, quantized))


def _edits(merging: Merging) -> tuple[dict[str, Matrix], dict[str, Tensor]]:
    """What is added to which stored tensor, and which are given whole."""
    changes: dict[str, Matrix] = {}
    whole: dict[str, Tensor] = {}
    problems = []
    for name, change in merging.adapter.changes.items():
        found = _added(merging.weights.source(name), change, merging.places[name])
        if not found:
            problems.append(f"{name}: made from {', '.join(merging.weights.stored_names(name)[:3])} by transformers")
        changes.update(found)
    for name, tensor in merging.adapter.replaced.items():
        source = merging.weights.source(name)
        if type(source) is not Plain:
            problems.append(f"{name}: trained whole, and not stored so")
        whole[source.names[0]] = tensor
    if problems:
        headline = f"{merging.base}: cannot be merged into its own tensors. Leave the adapter beside the model:"
        raise join_errors(UnsupportedError, headline, problems)
    return changes, whole


def _added(source: Source, change: LowRank, place: Place) -> dict[str, Matrix]:
    """What an adapter adds to each stored tensor that `source` is made from; nothing where only transformers knows."""
    as_held: Matrix = lambda e: change.of(e).T if place.transposed else change.of(e)  # noqa: E731
    if type(source) in (Plain, StoredTransposed, ModelTransposed):
        return {source.names[0]: as_held}
    if type(source) is TransposedRows:
        return {source.names[0]: lambda e: as_held(e).T}
    if type(source) is RowsInTurn:
        return {source.names[0]: lambda e: torch.stack(as_held(e).chunk(2), 1).flatten(0, 1)}
    if type(source) is not Stacked:
        return {}
    found: dict[str, Matrix] = {}
    for part, rows in zip(source.parts, change.b.chunk(len(source.parts), 1), strict=True):
        of = change.rows(rows).of
        singles = {} if isinstance(part, str) else {name: (lambda _, e=e, of=of: of(e)) for e, name in enumerate(part)}
        found |= singles or {part: of}
    return found


def _stored(merging: Merging, info: TensorInfo, turned: bool, change: Matrix | None, whole: Tensor | None) -> Written:
    """A stored tensor, changed or not. `turned`: dequantized it is held the other way round, as unquantized are."""
    shape = (*info.shape[:-2], info.shape[-1], info.shape[-2]) if turned else info.shape
    if not info.type.computed:
        return Written(info.name, shape, info.type, lambda: iter([merging.files.packed(info.name).data]))
    if isinstance(info.type, ScaledType):
        kind = QUANT_TYPES[merging.type or "BF16"]
    else:
        kind = QUANT_TYPES[merging.type] if merging.type else info.type
    if change is None and whole is None and kind is info.type:
        return Written(info.name, shape, kind, lambda: iter([merging.files.packed(info.name).data]))

    def read(number: int) -> Tensor:
        packed = merging.files.packed(info.name)
        matrix = numbers(packed.expert(number) if _is_stack(shape) else packed)
        return matrix.T.contiguous() if turned else matrix

    return written(merging, info.name, shape, kind, read, change, whole)


def written(
    merging: Merging, name: str, shape: tuple[int, ...], kind: QuantType, read: Matrix, change: Matrix | None,
    whole: Tensor | None = None,
) -> Written:  # fmt: skip
    """The matrices that `read` reads in float32, `change` added to each."""

    def pieces() -> Iterator[Tensor]:
        for number in range(shape[0] if _is_stack(shape) else 1):
            wanted = read(number) if whole is None else whole.float()
            yield merging.stored(name, kind, wanted, None if change is None else change(number))

    return Written(name, shape, kind, pieces)


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is of many matrices; a convolution [channels, 1, width] is none."""
    return len(shape) == 3 and shape[1] > 1


# --- of a GGUF file -----------------------------------------------------------------------------------------


def from_gguf(merging: Merging) -> dict[str, Any]:
    """One file with the names of transformers' own model; what is quantized becomes BF16."""
    tied = set(merging.model.all_tied_weights_keys)
    shapes = {name: tuple(t.shape) for name, t in merging.model.state_dict().items() if name not in tied}
    if problems := merging.weights.problems(shapes):
        raise join_errors(WeightError, f"{merging.base}: the weights do not fit the model:", problems)
    tensors = [_of_model(merging, name, shape) for name, shape in shapes.items()]
    kinds = {info.type.name for name in shapes for info in merging.weights.infos(name)}
    if kinds - {*FLOATS}:
        _note_quantized(merging)
    files = _parted(tensors)
    return _write(merging, files, lambda folder: _from_metadata(merging, folder, by_type(tensors)))


def _of_model(merging: Merging, name: str, shape: tuple[int, ...]) -> Written:
    place, change = merging.places.get(name), merging.adapter.changes.get(name)
    stored = {info.type for info in merging.weights.infos(name)}
    own = stored.pop() if len(stored) == 1 else None
    kind = QUANT_TYPES[merging.type or (own.name if own and own.name in FLOATS else "BF16")]
    added = None if change is None else lambda e: change.of(e).T if place.transposed else change.of(e)
    experts = gguf_names.expert(name)
    if experts and not experts["bias"]:
        read = lambda e: _expert(merging, name, experts["which"], e, place.transposed)  # noqa: E731
    else:
        read = lambda _: merging.weights.tensor(name, dtype=torch.float32)  # noqa: E731
    return written(merging, name, shape, kind, read, added, merging.adapter.replaced.get(name))


def _expert(merging: Merging, name: str, which: str, number: int, transposed: bool) -> Tensor:
    """One matrix of a stack, as the model holds it."""
    experts = merging.weights.source(name)
    parts = [numbers(experts.matrices(part)[number]) for part in range(len(experts.parts))]
    in_turn = isinstance(experts, StackedColumns) and experts.interleaved
    matrix = torch.stack(parts, 1).flatten(0, 1) if in_turn else torch.cat(parts)
    return matrix.T.contiguous() if transposed else matrix


_FILE_BYTES = 5 << 30


def _parted(tensors: list[Written]) -> dict[str, list[Written]]:
    """Tensors by the files they go to, named as transformers does."""
    groups: list[list[Written]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + tensor.nbytes > _FILE_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": tensors}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _from_metadata(merging: Merging, folder: Path, types: dict[str, int]) -> None:
    from ktransformers.gguf_files.tokenizer import tokenizer_from_gguf

    config = merging.config
    config.dtype = torch.bfloat16 if "BF16" in types else torch.float16 if "F16" in types else torch.float32
    config.architectures = [type(merging.model).__name__]
    if merging.base.is_dir():
        _copy_rest(merging, folder, True)
        return
    config.save_pretrained(folder)
    try:
        tokenizer_from_gguf(merging.base).save_pretrained(folder)
    except (UnsupportedError, WeightError) as error:
        merging.notices.append(f"no tokenizer was written: {error}")


def _note_quantized(merging: Merging) -> None:
    kind = merging.type or "BF16"
    merging.notices.append(f"the base is quantized: its tensors were dequantized to {kind}; OUT.gguf keeps them small")


# --- the folder ---------------------------------------------------------------------------------------------


def _write(merging: Merging, files: dict[str, list[Written]], rest: Callable[[Path], None]) -> dict[str, Any]:
    """Write the folder, whole or not at all. `rest` writes what is not weights."""
    every = [one for tensors in files.values() for one in tensors]
    inside = merging.out / "model.safetensors"
    known = {*files, "model.safetensors.index.json"} if len(files) > 1 else {*files}
    if other := sorted(path.name for path in merging.out.glob("*.safetensors*") if path.name not in known):
        raise WeightError(f"{merging.out}: also holds {other[0]}, which would be read with what is written. Remove it.")
    with (
        write.folder_beside(inside, sum(one.nbytes for one in every)) as folder,
        write.progress_bar(every, merging.show, "merging") as done,
    ):
        rest(folder)
        for name, tensors in files.items():
            write_safetensors(folder / name, tensors, done)
        if len(files) > 1:
            _write_index(folder, files)
        return {"files": write.publish(folder, inside), "types": by_type(every)}


def _write_index(folder: Path, files: dict[str, list[Written]]) -> None:
    places = {one.name: name for name, tensors in files.items() for one in tensors}
    total = sum(one.nbytes for tensors in files.values() for one in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_rest(merging: Merging, folder: Path, quantized: bool) -> None:
    """Config, tokenizer, and what else lies in the base's folder, without what is said of its quantization."""
    for path in sorted(merging.base.iterdir()):
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name not in _OF_QUANTIZATION:
            shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8-sig"))
    for part in (fields, fields.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config") if quantized else ():
                part.pop(key, None)
            if merging.type:
                part["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[merging.type]
                part.pop("torch_dtype", None)
    config.write_text(json.dumps(fields, indent=2) + "\n")
