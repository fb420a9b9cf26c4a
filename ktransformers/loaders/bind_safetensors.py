"""Safetensors names to the model's, through transformers' own conversion mapping: known families need nothing here."""

import copy
import re
from collections import defaultdict

from ktransformers.errors import UnsupportedError
from ktransformers.loaders import schemes
from ktransformers.loaders.base import TensorInfo, WeightFiles
from ktransformers.loaders.binding import Binding, Shapes, extra_layers
from ktransformers.loaders.sources import (
    Converted,
    ModelTransposed,
    Plain,
    RowsInTurn,
    Source,
    Stacked,
    StoredTransposed,
    TransposedRows,
)
from ktransformers.models.traits import TRAITS, identity_experts, is_interleaved, is_transposed
from ktransformers.quants.scaled import ScaledType

OTHER_MODALITIES = r"^(model\.)?(visual|vision|audio|multi_modal_projector|mm_projector)[a-z_]*\."
"""Parts of a multimodal checkpoint that a model of its text alone leaves aside."""


def bind_safetensors(files: WeightFiles, model, shapes: Shapes, binding: Binding) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    # Matching marks transforms as used and some keep state, so they are copied; those expect sorted keys.
    transforms = copy.deepcopy(get_model_conversion_mapping(model))
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    _find_layouts(model, binding)
    for key in sorted(files.names(), key=_natural):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes and key in shapes:
            target, pattern = key, None
        if target not in shapes:
            if _is_idle_bias(files, key):
                binding.harmless.add(key)
            continue
        if pattern is None:
            _add_plain(files, key, target, shapes, binding)
        else:
            collected[target][pattern].append(key)
    for target, parts in collected.items():
        converter = by_pattern[next(iter(parts))]
        if _merges_experts(converter) or _splits_experts(converter):
            _add_stacked(files, target, converter, parts, shapes, binding)
        elif (packed := _stays_packed(files, target, converter, parts, shapes)) is not None:
            binding.sources[target] = packed
        else:
            _add_converted(files, target, converter, parts, model, binding)
    binding.ignored += [r"rotary_emb\.inv_freq$", schemes.IGNORED]
    if model.config is model.config.get_text_config():
        binding.ignored.append(OTHER_MODALITIES)
    binding.ignored += [rf"^(model\.)?layers\.{n}\." for n in extra_layers(model.config)]


def _find_layouts(model, binding: Binding) -> None:
    """Note which experts have other layouts than [E, N, K] of all experts with gate before up."""
    for prefix, module in model.named_modules():
        if not TRAITS["experts"](module):
            continue
        names = [f"{prefix}.{name}" for name in ("gate_up_proj", "down_proj")]
        if is_transposed(module):
            binding.transposed.update(names)
        if is_interleaved(module):
            binding.interleaved.add(names[0])
        if identity_experts(module):
            binding.experts[names[0]] = len(module.down_proj)


def _is_idle_bias(files: WeightFiles, key: str) -> bool:
    """Whether `key` is a bias of zeros with quantized codes: AutoGPTQ writes one for layers that have none."""
    weight = f"{key.removesuffix('bias')}weight"
    if not key.endswith(".bias") or weight not in files or not isinstance(files.info(weight).type, ScaledType):
        return False
    return not files.packed(key).data.any()


def _natural(key: str) -> str:
    """Sorts layer 10 after layer 9."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), key)


def _add_plain(files: WeightFiles, key: str, target: str, shapes: Shapes, binding: Binding) -> None:
    if target in binding.sources:
        binding.notes.append(
            f"{target}: both {binding.sources[target].names[0]} and {key} in the checkpoint name it"
        )
        binding.harmless.add(key)
    elif target in binding.transposed:
        source = ModelTransposed if _is_stack_of_rows(files.info(key)) else StoredTransposed
        binding.sources[target] = source(files, key)
    else:
        binding.sources[target] = Plain(files, key, shapes[target])


def _is_stack_of_rows(info: TensorInfo) -> bool:
    return isinstance(info.type, ScaledType) and len(info.shape) == 3


def _merges_experts(converter) -> bool:
    """Whether a conversion stacks the experts, then perhaps puts gate on top of up. Such weights stay packed."""
    merges = _steps(converter, "dim") in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    return merges and len(converter.target_patterns) == 1


def _splits_experts(converter) -> bool:
    """Whether a conversion deals the experts of one list out to several modules, stacked as above (ERNIE-4.5-VL)."""
    return _steps(converter, "stack_dim", "concat_dim") == [("ErnieFuseAndSplitTextVisionExperts", 0, 1)]


def _steps(converter, *numbers: str) -> list[tuple]:
    """The operations of a conversion: each its name and its `numbers`, None for one that it has not."""
    return [(type(op).__name__, *(getattr(op, number, None) for number in numbers)) for op in converter.operations]


def _stays_packed(
    files: WeightFiles, target: str, converter, parts: dict[str, list[str]], shapes: Shapes
) -> Source | None:
    """The source of a stack of experts that a conversion only lays out anew: its rows stay those of the file.

    None for any other conversion, and for stored forms that cannot be laid out so.
    """
    stored = [names[0] for names in parts.values() if len(names) == 1]
    known = len(stored) == len(converter.source_patterns) and len(converter.target_patterns) == 1
    if not known or any(len(files.info(name).shape) != 3 for name in stored):
        return None
    steps = _steps(converter, "dim", "dim0", "dim1")
    if steps == [("Concatenate", 1, None, None)]:
        return Stacked(files, [parts[pattern][0] for pattern in converter.source_patterns])
    if steps == [("Interleave", 1, None, None)] and not converter.operations[0].inverse:
        return RowsInTurn(files, stored[0])
    if steps == [("Transpose", None, 1, 2)]:
        if converter.operations[0].check_dims and files.info(stored[0]).shape == shapes[target]:
            return Plain(files, stored[0], shapes[target])
        return None if _is_stack_of_rows(files.info(stored[0])) else TransposedRows(files, stored[0])
    return None


def _add_converted(
    files: WeightFiles, target: str, converter, parts: dict[str, list[str]], model, binding: Binding
) -> None:
    """Bind every result of a conversion that only transformers knows; `target` is the name of one of them."""
    found = next(pattern for pattern in converter.target_patterns if pattern in target)
    for pattern in converter.target_patterns:
        binding.sources[target.replace(found, pattern)] = Converted(files, parts, converter, pattern, target, model)


def _expert_index(key: str, pattern: str) -> int:
    index = key.removesuffix(pattern.rpartition("*")[2]).rpartition(".")[2]
    if not re.fullmatch("[0-9]{1,9}", index):
        raise UnsupportedError(
            f"{key}: no expert number where transformers' pattern {pattern!r} has one. Report this name."
        )
    return int(index)


def _add_stacked(
    files: WeightFiles, target: str, converter, keys: dict[str, list[str]], shapes: Shapes, binding: Binding
) -> None:
    """Bind per-expert matrices to stacked parameters: to one, or in equal shares to several in order."""
    found = next(pattern for pattern in converter.target_patterns if pattern in target)
    targets = [target.replace(found, pattern) for pattern in converter.target_patterns]
    parts = [(p, {_expert_index(key, p): key for key in keys.get(p, ())}) for p in converter.source_patterns]
    first = 0
    for name in targets:
        count = binding.experts.get(name, shapes[name][0])
        _add_stack(files, name, parts, range(first, first + count), binding)
        first += count


Parts = list[tuple[str, dict[int, str]]]
"""Pattern and keys by expert, of gate and then up, or of down."""


def _add_stack(files: WeightFiles, target: str, parts: Parts, experts: range, binding: Binding) -> None:
    """Bind the matrices of `experts` to one stacked parameter; note which of them are missing."""
    if target in binding.experts:  # those of idle experts may be there too
        binding.harmless.update(key for _, found in parts for key in found.values())
    missing = [pattern.replace("*", str(e)) for pattern, found in parts for e in experts if e not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        binding.absent[target] = f"incomplete in the checkpoint, which lacks ...{', '.join(missing[:3])}{more}"
        binding.harmless.update(name for _, found in parts for name in found.values())
        return
    if target in binding.sources:
        binding.notes.append(f"{target}: stacked and per expert in the checkpoint")
    binding.sources[target] = Stacked(files, [tuple(found[e] for e in experts) for _, found in parts])
