"""GGUF LoRA files in llama.cpp's layout, written and read: `peft_to_gguf` and `gguf_to_peft`.

Of each adapted tensor of the model's own GGUF file such a file has `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r],
of experts [E, r, in] and [E, out, r], and for all of them one `adapter.lora.alpha`, which readers divide by the rank.
What else a scale depends on (rsLoRA, patterns) is multiplied into lora_b. Rows are in the order of the file
(gguf_names.py), so a factor moves as the matrix it belongs to. Layout and keys follow llama.cpp's
convert_lora_to_gguf.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransformers.configs import meta_model
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError, did_you_mean, is_whole, join_errors
from ktransformers.gguf_files.write import folder_beside, publish
from ktransformers.loaders import gguf_names, open_weights
from ktransformers.loaders.base import WeightFiles
from ktransformers.loaders.gguf_layouts import KV_B
from ktransformers.loaders.gguf_names import Family
from ktransformers.loaders.lora import Adapter, LowRank, Place, places, shared_input
from ktransformers.loaders.peft_files import read_peft, write_peft

ALPHA = "adapter.lora.alpha"
Changes = dict[str, LowRank]


# --- by the names and in the order of a model's GGUF file ---------------------------------------------------


def in_gguf(adapter: Adapter, config: Any) -> Changes:
    """The changes of `adapter` by the names of the model's GGUF tensors, rows as they have them.

    Raises UnsupportedError with all that GGUF has no name for.
    """
    family = family_for(config)
    found: Changes = {}
    problems: list[str] = []
    for name, change in adapter.changes.items():
        try:
            found.update(_stored(family, config, name, change))
        except UnsupportedError as error:
            problems.append(str(error))
    if problems:
        raise join_errors(UnsupportedError, f"{adapter.path}: cannot be said of a GGUF file:", problems[:20])
    return found


def family_for(config: Any) -> Family:
    """The family of GGUF files of models of `config`. Raises UnsupportedError."""
    for family in gguf_names.FAMILIES.values():
        if config.model_type in family.model_types:
            return family
    raise UnsupportedError(f"The GGUF names of {config.model_type!r} models are not known to this version.")


def _stored(family: Family, config: Any, name: str, change: LowRank) -> Iterator[tuple[str, LowRank]]:
    if expert := gguf_names.expert(name):
        kinds = ("gate", "up") if expert["which"] == "gate_up" else (expert["which"],)
        for number, kind in enumerate(kinds):
            step = family.interleaved and len(kinds) == 2
            rows = change.b[:, number::2] if step else change.b.chunk(len(kinds), 1)[number]
            yield f"blk.{expert['layer']}.ffn_{kind}_exps.weight", change.rows(rows)
        return
    stored = gguf_names.gguf_name(family, config.num_hidden_layers, name)
    if stored is None:
        raise UnsupportedError(f"{name}: GGUF has no name for it in architecture {family.arch}")
    how = gguf_names.layout(family, stored)
    if how is None:
        yield stored, change
    elif how is KV_B:
        k_b, v_b = gguf_names.part_names(stored, how)
        k, v = how.store(change.b, config)  # [h, r, nope] and [h, value, r]
        a = change.a.expand(len(k), *change.a.shape)
        yield k_b, LowRank(k, a.transpose(1, 2), change.scale)
        yield v_b, LowRank(a, v, change.scale)
    elif how.columns:
        yield stored, LowRank(how.store(change.a, config)[0], change.b, change.scale)
    else:
        yield from zip(gguf_names.part_names(stored, how), map(change.rows, how.store(change.b, config)), strict=True)


# --- writing ------------------------------------------------------------------------------------------------


def peft_to_gguf(folder: str | Path, out: str | Path, config: Any) -> Path:
    """Write PEFT's adapter in `folder` as the GGUF LoRA file `out`, for models of `config`.

    Raises WeightError for an adapter that does not fit the model, and UnsupportedError for what such a file cannot say.
    """
    folder, out = Path(folder), Path(out)
    adapter = read_peft(folder, meta_model(config))
    if adapter.replaced:
        names = ", ".join(sorted(adapter.replaced)[:6])
        raise UnsupportedError(f"{folder}: {names}: trained whole, which no GGUF LoRA file can hold. Use `kt merge`.")
    changes = in_gguf(adapter, config)
    if split := sorted(name for name in changes if re.search(r"\.attn_[kv]_b\.weight$", name)):
        raise UnsupportedError(
            f"{folder}: kv_b_proj is adapted. GGUF files have it in two parts ({split[0]}, ...), which llama.cpp "
            "computes without adapters. Use `kt merge`, or train without kv_b_proj."
        )
    return write_gguf_lora(out, family_for(config).arch, changes, adapter.alpha, folder.resolve().name)


def write_gguf_lora(out: Path, arch: str, changes: Changes, alpha: float, name: str = "adapter") -> Path:
    """Write `changes`, as from `in_gguf`, to a GGUF LoRA file; it appears whole or not at all."""
    import gguf

    alpha = alpha or 1.0  # 0 means to readers that there is no scale
    with folder_beside(out) as folder:
        writer = gguf.GGUFWriter(folder / out.name, arch)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_name(name)
            writer.add_float32(ALPHA, alpha)
            for stored, change in changes.items():
                for which, factor in zip("ab", _as_stored(change, alpha), strict=True):
                    writer.add_tensor(f"{stored}.lora_{which}", factor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return publish(folder, out)[0]


def _as_stored(change: LowRank, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b of readers that scale by alpha / rank."""
    a, b, factor = change.a.float(), change.b.float(), change.scale / (alpha / change.rank)
    b = b if abs(factor - 1) < 1e-6 else b * factor
    if change.embedding:  # readers take rows of lora_a and multiply by lora_b
        a, b = b, a.T
    return a.contiguous().numpy(), b.contiguous().numpy()


# --- reading ------------------------------------------------------------------------------------------------


def is_gguf_lora(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def gguf_to_peft(file: str | Path, config: Any, folder: str | Path) -> Path:
    """Write the GGUF LoRA `file`, made for models of `config`, as a folder that stock PEFT loads."""
    model = meta_model(config)
    adapter = read_gguf_lora(Path(file), model, config)
    write_peft(adapter, Path(folder), model, getattr(config, "name_or_path", ""))
    return Path(folder)


def read_gguf_lora(path: Path, model: nn.Module, config: Any) -> Adapter:
    """The adapter of a GGUF LoRA file by the names of `model`, usually on the meta device.

    Raises WeightError for another model's, or a damaged one, with everything that does not fit.
    """
    with open_weights(path) as files:
        alpha = _check_kind(path, files, family_for(config).arch)
        adapter, problems = Adapter(path, alpha), []
        reader = _Reader(files, config, alpha)
        for place in places(model).values():
            try:
                if (change := reader.of(place)) is not None:
                    adapter.changes[place.name] = change
            except KTransformersError as error:
                problems.append(str(error))
        known = reader.looked_for
        left = [name for name in files.names() if name not in reader.used]
        problems += [f"{name}: the model has no such tensor{did_you_mean(name, known)}" for name in left]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise join_errors(WeightError, f"{path}: the adapter does not fit the model.", shown)
    if not adapter.changes:
        raise WeightError(f"{path}: the adapter holds no tensor.")
    return adapter


def _check_kind(path: Path, files: WeightFiles, arch: str) -> float:
    """Alpha of a file that is a LoRA for models of `arch`."""
    found = files.metadata.get("general.type"), files.metadata.get("adapter.type")
    if found != ("adapter", "lora"):
        raise WeightError(
            f"{path}: general.type is {found[0]!r} and adapter.type {found[1]!r}, expected 'adapter' and 'lora'. Give "
            "a GGUF LoRA file, as `convert_lora_to_gguf.py` writes it."
        )
    if (made_for := files.metadata.get("general.architecture")) != arch:
        raise WeightError(f"{path}: an adapter for {made_for!r} models, this one is {arch!r}. Give one of its own.")
    if files.metadata.get("adapter.alora.invocation_tokens"):
        raise UnsupportedError(f"{path}: an aLoRA, which acts after certain tokens only, is not computed here.")
    alpha = files.metadata.get(ALPHA, 0.0)
    if not (isinstance(alpha, float) or is_whole(alpha)) or not np.isfinite(alpha):
        raise WeightError(f"{path}: {ALPHA} is {alpha!r}, expected a number. Write the file again.")
    return float(alpha)


class _Reader:
    """What a file has for each tensor of the model."""

    def __init__(self, files: WeightFiles, config: Any, alpha: float) -> None:
        self.files, self.config, self.alpha, self.family = files, config, alpha, family_for(config)
        self.used: set[str] = set()
        self.looked_for: set[str] = set()

    def of(self, place: Place) -> LowRank | None:
        if expert := gguf_names.expert(place.name):
            return self._experts(place, expert["layer"], expert["which"])
        stored = gguf_names.gguf_name(self.family, self.config.num_hidden_layers, place.name)
        if stored is None:
            return None
        how = gguf_names.layout(self.family, stored)
        if how is None or how is KV_B:  # whole in older files, as the model has it
            return self._pair(stored, place.shape, place.embedding)
        if how.columns:
            if (found := self._pair(stored, place.shape)) is None:
                return None
            return LowRank(how.load([found.a], tuple(found.a.shape), self.config), found.b, found.scale)
        return self._in_parts(place, how, gguf_names.part_names(stored, how))

    def _in_parts(self, place: Place, how: Any, names: list[str]) -> LowRank | None:
        shapes = [size[:1] + place.shape[1:] for size in how.shapes(place.shape, self.config)]
        parts = [self._pair(name, shape) for name, shape in zip(names, shapes, strict=True)]
        if not any(parts):
            return None
        one = next(part for part in parts if part)
        if any(part and not (part.scale == one.scale and torch.equal(part.a, one.a)) for part in parts):
            raise UnsupportedError(f"{place.name}: its parts {', '.join(names)} have adapters with inputs of their own")
        rows = [p.b if p else torch.zeros(s[0], one.rank) for p, s in zip(parts, shapes, strict=True)]
        return one.rows(how.load(rows, (place.shape[0], one.rank), self.config))

    def _experts(self, place: Place, layer: str, which: str) -> LowRank | None:
        count, rows, columns = place.shape
        if which != "gate_up":
            return self._pair(f"blk.{layer}.ffn_{which}_exps.weight", place.shape)
        half = (count, rows // 2, columns)
        gate, up = (self._pair(f"blk.{layer}.ffn_{kind}_exps.weight", half) for kind in ("gate", "up"))
        if gate is None and up is None:
            return None
        joined = shared_input(gate, up, rows // 2)
        in_turn = torch.stack(joined.b.chunk(2, 1), 2).flatten(1, 2)
        return joined.rows(in_turn) if self.family.interleaved else joined

    def _pair(self, stored: str, shape: tuple[int, ...], embedding: bool = False) -> LowRank | None:
        names = [f"{stored}.lora_{which}" for which in "ab"]
        self.looked_for.update(names)
        there = [name for name in names if name in self.files]
        self.used.update(there)
        if not there:
            return None
        if len(there) < 2:
            raise WeightError(f"{there[0]}: without its other factor")
        a, b = (self._factor(name, len(shape)) for name in names)
        if embedding:
            a, b = b.T, a
        rank = a.shape[-2]
        change = LowRank(a, b, self.alpha / rank if self.alpha else 1.0, embedding)
        if rank != b.shape[-1] or change.shape != shape:
            raise WeightError(
                f"{stored}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are no factors of {list(shape)}"
            )
        return change

    def _factor(self, name: str, dims: int) -> Tensor:
        tensor = self.files.tensor(name)
        if tensor.dim() > dims and tensor.shape[0] == 1:
            tensor = tensor[0]
        while tensor.dim() < dims:  # a file leaves out sizes of one at the end
            tensor = tensor.unsqueeze(0)
        return tensor
