"""GGUF names to the model's, through gguf_names.py, and the file's metadata against the config."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence

import torch

from ktransformers.errors import UnsupportedError, is_whole
from ktransformers.loaders import gguf_names
from ktransformers.loaders.base import WeightFiles
from ktransformers.loaders.binding import Binding, Shapes, extra_layers
from ktransformers.loaders.sources import (
    Permuted,
    Plain,
    Source,
    Stacked,
    StackedColumns,
)
from ktransformers.models.traits import is_beside_text


def bind_gguf(files: WeightFiles, model, shapes: Shapes, binding: Binding) -> None:
    config = model.config
    if lacking := sorted({".".join(name.split(".")[:2]) for name in shapes if is_beside_text(name)}):
        raise UnsupportedError(
            f"{files.paths[0]}: a GGUF file holds a language model alone, and {type(model).__name__} also has "
            f"{', '.join(lacking)}. Use the model's safetensors, or build the class of its text alone where there is "
            "one (AutoModelForCausalLM)."
        )
    family = gguf_names.family_of(files.metadata.get("general.architecture"), config.model_type)
    binding.notes += _mismatches(files, family.arch, config)
    for notice in _notices(files.metadata, family.arch, config):
        warnings.warn(notice, UserWarning, stacklevel=3)
    if family.interleaved:
        binding.interleaved.update(name for name in shapes if name.endswith(".experts.gate_up_proj"))
    for name, shape in shapes.items():
        source, looked_for = _gguf_source(files, family, config, name, shape)
        if source is not None:
            binding.sources[name] = source
        else:
            binding.absent[name] = f"missing in the checkpoint, looked for {looked_for}"
    binding.ignored.append(gguf_names.IGNORED.pattern)
    predicting = files.metadata.get(f"{family.arch}.nextn_predict_layers")
    binding.ignored += [rf"^blk\.{n}\." for n in extra_layers(config, predicting)]
    # Some files hold kv_b whole and split; the whole one is used.
    binding.harmless.update(
        n
        for n in files.names()
        if re.search(r"\.attn_[kv]_b\.weight$", n) and re.sub(r"attn_[kv]_b", "attn_kv_b", n) in files
    )


def _gguf_source(
    files: WeightFiles, family, config, name: str, shape: tuple[int, ...]
) -> tuple[Source | None, str]:
    """The source of one model tensor, and the GGUF name or names that were looked for."""
    expert = gguf_names.expert(name)
    if expert and not expert["bias"]:
        return _gguf_experts(files, family, expert["layer"], expert["which"], shape)
    stored = gguf_names.gguf_name(family, config.num_hidden_layers, name)
    if stored is None:
        return None, "no name: GGUF has none for it"
    how = gguf_names.layout(family, stored)
    names = gguf_names.part_names(stored, how) if how else [stored]
    if how and all(part in files for part in names):
        if not how.parts or stored not in files:
            return Permuted(files, names, how, shape, config), stored
    if stored in files and (how is None or how.parts):
        return Plain(files, stored, shape), stored
    return None, stored if names == [stored] else f"{stored}, or {' and '.join(names)}"


def _gguf_experts(
    files: WeightFiles, family, layer: str, which: str, shape: tuple[int, ...]
) -> tuple[Source | None, str]:
    fused = f"blk.{layer}.ffn_{which}_exps.weight"
    if fused in files and which == "gate_up" and not family.columns:
        return Stacked(files, [fused]), fused
    kinds = ("gate", "up") if which == "gate_up" else (which,)
    parts, looked_for = [], []
    for kind in kinds:
        stacked, single = gguf_names.expert_names(layer, kind, shape[0])
        looked_for.append(stacked)
        if stacked in files:
            parts.append(stacked)
        elif single[0] in files and all(name in files for name in single):
            parts.append(single)
        elif single[0] in files:
            looked_for[-1] = next(name for name in single if name not in files)
    if len(parts) < len(kinds):
        return None, " and ".join(looked_for)
    source = StackedColumns(files, parts, family.interleaved) if family.columns else Stacked(files, parts)
    return source, " and ".join(looked_for)


def _mismatches(files: WeightFiles, arch: str, config) -> list[str]:
    """What the file and the config both say and do not agree on."""
    notes, metadata = [], files.metadata

    def compare(key: str, stored: object, attribute: str, *also: int) -> None:
        wanted = getattr(config, attribute)
        if is_whole(stored) and stored != wanted and stored not in also:
            notes.append(f"{arch}.{key} is {stored} in the GGUF file, the config has {attribute} {wanted}")

    stated = metadata.get(f"{arch}.nextn_predict_layers")
    extra = len(extra_layers(config, stated))  # files may count the prediction layers that they leave out, or not
    layers = config.num_hidden_layers
    compare("block_count", metadata.get(f"{arch}.block_count"), "num_hidden_layers", layers + extra)
    for key, attributes in gguf_names.CHECKS:
        if attribute := _attribute(config, attributes):
            compare(key, metadata.get(f"{arch}.{key}"), attribute)
    notes += _other_kv_heads(metadata, arch, config)
    scaled = next((name for name in ("rope_freqs.weight", "rope_factors_long.weight") if name in files), None)
    if scaled and _unscaled(config) and bool((files.tensor(scaled, dtype=torch.float32) != 1).any()):
        notes.append(
            f"{scaled} scales RoPE in the GGUF file, the config has rope_type 'default'; take both from the same source"
        )
    return notes


def _other_kv_heads(metadata: dict, arch: str, config) -> list[str]:
    """Key-value heads that are not the config's. Rows of k_proj do not tell them: half as many of twice the size fit.

    A file has one number, or one for each layer: 0 where a layer is no attention, twice the config's in layers of some
    families. Latent attention (MLA) has no such heads; its files say 1, or all heads, by age.
    """
    key, wanted = f"{arch}.attention.head_count_kv", getattr(config, "num_key_value_heads", None)
    stored = metadata.get(key)
    counts = {stored} if is_whole(stored) else set(stored) - {0} if isinstance(stored, Sequence) else set()
    if not wanted or getattr(config, "kv_lora_rank", None) or not counts or wanted in counts:
        return []
    found = stored if is_whole(stored) else sorted(counts)
    return [f"{key} is {found} in the GGUF file, the config has num_key_value_heads {wanted}"]


def _unscaled(config) -> bool:
    """Whether the config says that no frequency is scaled; some families have settings for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return all(part.get("rope_type", "default") == "default" for part in kinds)


def _attribute(config, attributes: tuple[str, ...]) -> str | None:
    """The first of `attributes` that the config has."""
    return next((name for name in attributes if getattr(config, name, None) is not None), None)


def _notices(metadata: dict, arch: str, config) -> Iterator[str]:
    """Choices that the config makes otherwise than the file, whose floats are float32."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("full_attention", rope).get("rope_theta")
    for key, attributes in gguf_names.CHOICES:
        attribute, stored = _attribute(config, attributes) or attributes[0], metadata.get(f"{arch}.{key}")
        wanted = theta if attribute == "rope_theta" else getattr(config, attribute, None)
        if _is_number(stored) and _is_number(wanted) and not math.isclose(stored, wanted, rel_tol=1e-5):
            yield f"{attribute} is {wanted} in the config and {stored:.7g} in the GGUF file; the config's number counts"


def _is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, float)
