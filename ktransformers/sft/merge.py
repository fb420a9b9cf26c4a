"""`kt merge`: an adapter made part of a checkpoint, a folder or a GGUF file into either.

One matrix at a time: read from the mapped base, changed in float32, stored, and compared with what it should be.
Tensors without an adapter are copied byte for byte where their type stays.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ktransformers.configs import meta_model, read_config
from ktransformers.errors import NativeError, UnsupportedError, WeightError, did_you_mean
from ktransformers.gguf_files.write import FILE_TYPES
from ktransformers.loaders import ModelWeights, WeightFiles, bind, open_weights
from ktransformers.loaders.lora import Adapter, Place, places
from ktransformers.loaders.writing import Written
from ktransformers.native import NOT_BUILT, available, encode
from ktransformers.paths import existing_path
from ktransformers.quants.blocks import QuantType
from ktransformers.sft.adapters import read_adapter
from ktransformers.sft.tally import Tally

FLOATS = ("F32", "F16", "BF16")
"""What --type may be for a folder."""


@dataclass
class Merging:
    """What every writer is given, and where it notes what it did. `type` "" keeps each tensor's."""

    base: Path
    out: Path
    type: str
    config: Any
    model: Any
    adapter: Adapter
    files: WeightFiles
    weights: ModelWeights
    show: bool
    tally: Tally = field(default_factory=Tally)
    notices: list[str] = field(default_factory=list)

    @property
    def places(self) -> dict[str, Place]:
        return places(self.model)

    def stored(self, name: str, kind: QuantType, wanted: Tensor, added: Tensor | None) -> Tensor:
        """`wanted`, a float32 matrix of `name` that is written over, plus what an adapter adds, as bytes of `kind`."""
        if added is not None:
            added = added.reshape(wanted.shape)
            self.tally.changed(name, added)
            wanted += added
        try:
            data = encode(wanted, kind)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error
        self.tally.stored(name, wanted, data, kind)
        return data


def merge(
    base: str | Path, adapter: str | Path, out: str | Path, kind: str = "", weights: str | Path = "", show: bool = False
) -> dict[str, Any]:
    """Write the checkpoint `base` with `adapter`, a PEFT folder or a GGUF LoRA file, merged in.

    Args:
        base: a model folder or a .gguf.
        out: NAME.gguf, or a folder that is to hold safetensors.
        kind: as `--type` of `kt quantize`, for a folder F32, F16 or BF16; "" keeps each tensor's type, where a base
            quantized in safetensors becomes BF16.
        weights: a .gguf of the model whose folder `base` is; "" is `base`.
        show: a progress bar.

    Returns a summary: files, bytes, tensors by type, notices, and what was changed and lost by kind of tensor.

    Raises:
        NativeError: the C library, which encodes, is not built.
        WeightError: an adapter of another base, a damaged file, a full disk.
        UnsupportedError: a type that cannot be written, or an adapter that is more than two factors.
    """
    base, weights, out = _checked(base, weights, out, kind)
    config = read_config(base)
    model = meta_model(config)
    read = read_adapter(adapter, model, config)
    _refuse_tied(read, model)
    with open_weights(weights) as files, warnings.catch_warnings(record=True) as caught:
        merging = Merging(base, out, kind, model.config, model, read, files, bind(files, model), show)
        written = _writer(files.format, out)(merging)
    report = merging.tally.report()
    merging.notices += [str(one.message) for one in caught if one.category is UserWarning] + _drowned(report["kinds"])
    return {
        "files": [str(path) for path in written["files"]],
        "bytes": sum(path.stat().st_size for path in written["files"]),
        "types": written["types"], "notices": merging.notices, **report,
    }  # fmt: skip


def _checked(base: str | Path, weights: str | Path, out: str | Path, kind: str) -> tuple[Path, Path, Path]:
    """The three paths, once all that can be known of them beforehand is right."""
    if not available():
        raise NativeError(f"merge: {NOT_BUILT}. It encodes in C.")
    if (found := existing_path(base, "model", WeightError)) is None:
        raise WeightError(f"model {base}: no such folder or file. Check the path.")
    if not str(weights):
        stored = found
    elif (stored := existing_path(weights, "--weights", WeightError)) is None or stored.suffix != ".gguf":
        raise WeightError(f"--weights {weights}: expected the path of a .gguf. Safetensors are the folder's own.")
    out = Path(out).expanduser()
    known = FILE_TYPES if out.suffix == ".gguf" else FLOATS
    if kind and kind not in known:
        where = "a GGUF file" if out.suffix == ".gguf" else "a folder, whose tensors are floats"
        raise UnsupportedError(f"--type {kind!r}{did_you_mean(kind, known)}: of {where} it is {', '.join(known)}.")
    if out.resolve() in (found.resolve(), stored.resolve()):
        raise WeightError(f"{out}: is the base itself, which is read while this is written. Choose another place.")
    return found, stored, out


def _refuse_tied(adapter: Adapter, model: Any) -> None:
    tied = model.all_tied_weights_keys
    both = {*tied, *tied.values()}
    if found := sorted(name for name in (*adapter.changes, *adapter.replaced) if name in both):
        raise UnsupportedError(
            f"{adapter.path}: {', '.join(found)}: this model has one tensor for {' and '.join(sorted(both))}, so both "
            "would change. Leave the adapter beside the model."
        )


def _drowned(kinds: dict[str, dict[str, Any]]) -> list[str]:
    """A notice of tensors whose change is smaller than what their type loses."""
    found = [kind for kind, row in kinds.items() if row["change"] and row["error"] >= row["change"]]
    if not found:
        return []
    shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return [f"storing {shown} loses more than the adapter changed: choose a larger --type, or leave the adapter beside"]


def _writer(form: str, out: Path) -> Callable[[Merging], dict[str, Any]]:
    from ktransformers.sft import merge_folder, merge_gguf

    if out.suffix == ".gguf":
        return merge_gguf.from_gguf if form == "gguf" else merge_gguf.from_folder
    return merge_folder.from_gguf if form == "gguf" else merge_folder.from_folder


def by_type(written: list[Written]) -> dict[str, int]:
    return dict(Counter(one.type.name for one in written))
