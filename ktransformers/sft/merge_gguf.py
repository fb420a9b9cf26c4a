"""A GGUF file with an adapter merged in, of a GGUF file or of a folder."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError, join_errors
from ktransformers.gguf_files import write
from ktransformers.gguf_files.lora import Changes, family_for, in_gguf
from ktransformers.gguf_files.rewrite import rewrite
from ktransformers.loaders import WeightFiles, checkpoint_dtype, gguf_names
from ktransformers.loaders.lora import LowRank
from ktransformers.loaders.writing import Written
from ktransformers.native.encode import encoded_types
from ktransformers.quants.blocks import Packed, QuantType
from ktransformers.quants.scaled import ScaledType
from ktransformers.sft.merge import Merging, by_type
from ktransformers.sft.tally import numbers

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# --- of a folder --------------------------------------------------------------------------------------------


def from_folder(merging: Merging) -> dict[str, Any]:
    """As `kt quantize` writes it, from changed numbers."""
    mix = merging.type or _NAMES[checkpoint_dtype(merging.files)]
    if not merging.type and _is_quantized(merging.files):
        mix = "BF16"
        merging.notices.append("the base is quantized: its tensors were dequantized to BF16; --type chooses another")
    planned: list[Any] = []

    def change(outputs: list[write.Output], config: Any) -> list[write.Output]:
        changes, whole = in_gguf(merging.adapter, config), _replaced(merging, config)
        if missing := sorted({*changes, *whole} - {output.name for output in outputs}):
            raise WeightError(f"{merging.base}: {', '.join(missing[:6])} are not among what is written, but adapted.")
        planned[:] = [_changed(output, changes, whole, merging) for output in outputs]
        return planned

    def seen(output: write.Output, piece: Tensor, packed: Tensor) -> None:
        merging.tally.stored(output.name, piece, packed, output.type)

    done = write.quantize_folder(merging.base, merging.out, mix, 0, merging.show, change=change, seen=seen)
    merging.notices += done["notices"]
    return {"files": [Path(path) for path in done["files"]], "types": done["types"]}


def _is_quantized(files: WeightFiles) -> bool:
    return any(isinstance(files.info(name).type, ScaledType) for name in files.names())


def _changed(output: write.Output, changes: Changes, whole: dict[str, Tensor], merging: Merging) -> write.Output:
    if (tensor := whole.get(output.name)) is not None:
        return replace(output, parts=lambda: iter([tensor.float().view(output.shape)]))
    if (change := changes.get(output.name)) is None:
        return output

    def parts() -> Iterator[Tensor]:
        first = 0
        for part in output.parts():  # of experts one matrix each, else the whole
            matrices = part.float().view(-1, *change.shape[-2:])
            added = torch.stack([change.of(first + number) for number in range(len(matrices))])
            merging.tally.changed(output.name, added)
            yield (matrices + added).view(part.shape)
            first += len(matrices)

    return replace(output, parts=parts)


def _replaced(merging: Merging, config: Any) -> dict[str, Tensor]:
    """Tensors that were trained whole, as a GGUF file has them."""
    family, found = family_for(config), {}
    for name, tensor in merging.adapter.replaced.items():
        if gguf_names.expert(name):
            raise UnsupportedError(f"{merging.adapter.path}: {name}: experts trained whole cannot be merged into GGUF.")
        for stored, shape, parts in write.stored_pieces(_Given(tensor), family, config, name, tuple(tensor.shape)):
            found[stored] = torch.cat(list(parts())).view(shape)
    return found


class _Given:
    """One tensor in place of a checkpoint."""

    def __init__(self, tensor: Tensor) -> None:
        self.given = tensor

    def tensor(self, name: str, device: Any = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        return self.given.to(device, dtype)


# --- of a GGUF file -----------------------------------------------------------------------------------------


def from_gguf(merging: Merging) -> dict[str, Any]:
    """The same metadata, and tensors that keep their bytes where neither adapter nor --type changes them."""
    files, config = merging.files, merging.config
    changes, whole = _in_file(merging, in_gguf(merging.adapter, config)), _replaced(merging, config)
    written, problems = [], []
    for name in files.names():
        info = files.info(name)
        kind = _kind(merging, name, info.shape) if merging.type else info.type
        touched = name in changes or name in whole
        if (touched or kind is not info.type) and kind.name not in encoded_types():
            problems.append(f"{name}: stored as {kind.name}, which this version does not write")
        written.append(_as_written(merging, name, kind, changes.get(name), whole.get(name)))
    if problems:
        step = "--type gives all tensors types that it does"
        shown = problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise join_errors(UnsupportedError, f"{files.paths[0]}: cannot be written so; {step}:", shown)
    file_type = write.FILE_TYPES[merging.type] if merging.type else None
    with (
        write.folder_beside(merging.out, sum(one.nbytes for one in written)) as folder,
        write.progress_bar(written, merging.show, "merging") as done,
    ):
        rewrite(files.paths[0], folder / merging.out.name, written, file_type, done)
        return {"files": write.publish(folder, merging.out), "types": by_type(written)}


def _kind(merging: Merging, name: str, shape: tuple[int, ...]) -> QuantType:
    tied = "output.weight" not in merging.files
    return write.choose_type(name, shape, merging.type, merging.config.num_hidden_layers, tied)


def _in_file(merging: Merging, changes: Changes) -> Changes:
    """`changes` by the names that this file has: some hold gate and up as one, experts one by one, or kv_b whole."""
    files, found = merging.files, dict(changes)
    for name, change in merging.adapter.changes.items():
        stored = gguf_names.gguf_name(family_for(merging.config), merging.config.num_hidden_layers, name)
        expert = gguf_names.expert(name)
        fused = f"blk.{expert['layer']}.ffn_gate_up_exps.weight" if expert else ""
        if not expert and stored in files:
            found[stored] = change if stored not in found else found[stored]
        elif fused in files and expert["which"] == "gate_up":
            found[fused] = change
    for name in [name for name in found if name not in files]:
        found.update(_one_by_one(name, found.pop(name), files))
    problems = [f"{name} is not in the file" for name in found if name not in files]
    problems += [
        f"{name} is {list(files.info(name).shape)} in the file, the adapter's {list(change.shape)}"
        for name, change in found.items()
        if name in files and _rows(files.info(name).shape) != _rows(change.shape)
    ]
    if problems:
        raise join_errors(WeightError, f"{merging.base}: the adapter does not fit the file:", problems[:20])
    return found


def _one_by_one(name: str, change: LowRank, files: WeightFiles) -> Changes:
    single = name.replace("_exps.weight", ".{}.weight")
    if single == name or change.a.dim() == 2 or single.format(0) not in files:
        whole = name.replace("attn_k_b", "attn_kv_b").replace("attn_v_b", "attn_kv_b")
        fused = name.replace("ffn_gate_exps", "ffn_gate_up_exps").replace("ffn_up_exps", "ffn_gate_up_exps")
        return {} if whole in files or fused in files else {name: change}
    factors = zip(change.a, change.b, strict=True)
    return {single.format(e): LowRank(a, b, change.scale) for e, (a, b) in enumerate(factors)}


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns, however the file groups the rows."""
    return torch.Size(shape[:-1]).numel(), shape[-1]


def _as_written(
    merging: Merging, name: str, kind: QuantType, change: LowRank | None, whole: Tensor | None
) -> Written:
    packed = merging.files.packed(name)

    def pieces() -> Iterator[Tensor]:
        if change is None and whole is None and kind is packed.type:
            yield packed.data
            return
        for number, matrix in enumerate(_matrices(packed, change)):
            wanted = numbers(matrix) if whole is None else whole.float().view(matrix.shape)
            yield merging.stored(name, kind, wanted, None if change is None else change.of(number))

    return Written(name, packed.shape, kind, pieces)


def _matrices(packed: Packed, change: LowRank | None) -> Iterator[Packed]:
    """The matrices that an adapter knows, one by one; the file may have their rows in one or several dimensions."""
    shape = packed.shape if change is None else change.shape
    if len(shape) != 3:
        yield packed
        return
    stack = Packed(packed.data, packed.type, tuple(shape))
    for number in range(shape[0]):
        yield stack.expert(number)
