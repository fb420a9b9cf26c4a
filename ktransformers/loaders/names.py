"""Between the checkpoint's names and the model's: `bind(files, model)` answers questions in module names.

Safetensors names go through transformers' own conversion mapping, so a family it knows needs nothing here;
GGUF names through gguf_names.py. Binding reads no tensor data.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean
from ktransformers.loaders import companions, gguf_names
from ktransformers.loaders.base import TensorInfo, WeightFiles
from ktransformers.loaders.report import Problem, grouped
from ktransformers.loaders.sources import (
    WHOLE_NUMBERS,
    Converted,
    Exchanged,
    ExpertWeights,
    Laid,
    Plain,
    Source,
    Stacked,
    StackedColumns,
    Transposed,
    WholeNumbers,
    split_down,
    split_gate_up,
    split_gate_up_bias,
)
from ktransformers.quants import Packed
from ktransformers.scaled import ScaledType, ScaledWeight
from ktransformers.traits import TRAITS, idle_experts, is_interleaved, is_transposed

Shapes = dict[str, tuple[int, ...]]


class ModelWeights:
    """A checkpoint that answers in module names (`model.layers.3.mlp.experts.gate_up_proj`).

    This is what operators get as `gguf_loader`, whatever the format. Every method that takes a name raises
    WeightError with the closest known one when the checkpoint cannot deliver it.
    """

    def __init__(self, files: WeightFiles, binding: "_Binding") -> None:
        self.files = files
        self.format = files.format
        self.on_read: Callable[[str], None] | None = None
        """Called with the name of each tensor that is delivered, so that loading can show how far it is."""
        self._binding = binding
        self._sources = binding.sources

    def names(self) -> list[str]:
        """Module-space names of everything the checkpoint can deliver."""
        return list(self._sources)

    def has(self, name: str) -> bool:
        return name in self._sources

    @property
    def path(self) -> Path:
        """What to call the checkpoint in a message: its file, or the folder of its files."""
        return self.files.paths[0] if len(self.files.paths) == 1 else self.files.paths[0].parent

    def _deliver(self, name: str) -> Source:
        source = self._source(name)
        if source.broken:
            raise WeightError(f"{name}: its parts in the checkpoint do not fit together: {_shapes(source)}.")
        if self.on_read is not None:
            self.on_read(name)
        return source

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            raise WeightError(f"The checkpoint has no weights for {name}{did_you_mean(name, self._sources)}.")
        return self._sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source(name).shape

    def infos(self, name: str) -> list[TensorInfo]:
        """The checkpoint's tensors behind `name`, as it describes them."""
        return self._source(name).infos

    def quant_type(self, name: str) -> str:
        """The stored type, "Q4_K" or "Q4_K+Q6_K" when several tensors of different types make one."""
        return "+".join(dict.fromkeys(info.type.name for info in self._source(name).infos))

    def methods(self, name: str) -> list[str]:
        """Every way in which parts of `name` are stored, by the names that users have for them, such as FP8, RAWINT4
        or, for all of GGUF, LLAMAFILE."""
        if self.format == "gguf":
            return ["LLAMAFILE"]
        return list(dict.fromkeys(companions.methods(info)[0] for info in self._source(name).infos))

    def is_stored_as(self, name: str, method: str) -> bool:
        """Whether every part of `name` is stored in a way that users call `method`."""
        if self.format == "gguf":
            return method == "LLAMAFILE"
        return all(method in companions.methods(info) for info in self._source(name).infos)

    def nbytes(self, name: str) -> int:
        """Bytes of the stored tensors behind `name`."""
        return sum(info.nbytes for info in self._source(name).infos)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's own names of the tensors behind `name`."""
        return self._source(name).names

    def tensor(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """The numbers, in memory of their own; `dtype` None is the stored float type, else float32.

        Peak memory is the result and a few MiB, for synthesized tensors twice the result. Raises
        UnsupportedError for a type that this version does not compute.
        """
        source = self._deliver(name)
        return source.tensor(device, dtype or source.native_dtype)

    def can_pack(self, name: str) -> bool:
        """Whether `packed(name)` can deliver, that is whether stored rows can be used as they are."""
        return self.has(name) and self._sources[name].can_pack

    def packed(self, name: str) -> Packed | ScaledWeight:
        """The stored bytes, a view of the mapped file; a q or k projection of a llama-type GGUF is one copy.

        Raises WeightError for a tensor that is made from several; use `tensor` or `experts` for those.
        """
        source = self._deliver(name)
        try:
            return source.packed()
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error

    def has_experts(self, prefix: str) -> bool:
        return self.has(f"{prefix}.{self._first(prefix)}") and self.has(f"{prefix}.down_proj")

    def _first(self, prefix: str) -> str:
        """What multiplies the input of experts: gate and up, or up alone where there is no gate."""
        return "up_proj" if self.has(f"{prefix}.up_proj") else "gate_up_proj"

    def experts_problem(self, prefix: str) -> str:
        """Say why `experts(prefix)` cannot deliver packed rows, or return ``""``."""
        for name in (f"{prefix}.{self._first(prefix)}", f"{prefix}.down_proj"):
            source = self._source(name)
            exchanged = isinstance(source, (Transposed, Exchanged))
            if isinstance(source, Converted) or exchanged != (name in self._binding.transposed):
                return f"{name} is stored in another form than its rows, so there are no packed rows of it"
            rows = source.shape[-1 if exchanged else 1] if len(source.shape) == 3 else 1
            if len(source.shape) != 3 or (name.endswith("gate_up_proj") and rows % 2):
                return f"{name} is no stack of matrices: {_shapes(source)}"
        return ""

    def experts(self, prefix: str) -> ExpertWeights:
        """The routed experts of the module `prefix` (`model.layers.3.mlp.experts`), packed.

        Copied are biases, and matrices where the file has no rows, only columns.
        """
        first = self._first(prefix)
        gate_up, down = self._deliver(f"{prefix}.{first}"), self._deliver(f"{prefix}.down_proj")
        if problem := self.experts_problem(prefix):
            raise WeightError(f"{problem}. Use tensor().")
        interleaved = f"{prefix}.gate_up_proj" in self._binding.interleaved
        gate_bias = up_bias = down_bias = None
        if self.has(name := f"{prefix}.gate_up_proj_bias"):
            gate_bias, up_bias = split_gate_up_bias(self.tensor(name, dtype=torch.float32), interleaved)
        if self.has(name := f"{prefix}.down_proj_bias"):
            down_bias = self.tensor(name, dtype=torch.float32)
        gate, up = split_gate_up(gate_up, interleaved) if first == "gate_up_proj" else (None, split_down(gate_up))
        copied = isinstance(down, Exchanged)
        return ExpertWeights(gate, up, split_down(down), gate_bias, up_bias, down_bias, copied)

    def problems(self, expected: Shapes, ignore_unexpected: Iterable[str] = ()) -> list[str]:
        """Every missing, misshapen, uncomputable and unused tensor; equal ones of many layers are one line.

        `expected` is what the model needs, by module name; `ignore_unexpected` are regular expressions of
        checkpoint names that may be left over. Reads no tensor data.
        """
        binding = self._binding
        missing = [name for name in expected if name not in self._sources]
        unused = self._unused(ignore_unexpected)
        found = [Problem(name, self._missing_text(name, unused, len(missing))) for name in missing]
        for name, shape in expected.items():
            if name in self._sources:
                found += self._misfits(name, tuple(shape))
        found += [Problem(name, "in the checkpoint, but the model has no place for it") for name in unused]
        notes = binding.notes
        if found and self.files.method and self.files.method not in companions.READ:
            known = ", ".join(companions.READ)
            notes = [f"its config names quant_method {self.files.method!r}, not read yet (read: {known})", *notes]
        return notes + grouped(found)

    def _missing_text(self, name: str, unused: list[str], missing: int) -> str:
        text = self._binding.absent.get(name, "missing in the checkpoint")
        few = missing <= 20 and len(unused) <= 200  # else the hint costs more than it helps
        return text + (did_you_mean(name, unused) if few else "")

    def _misfits(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        source = self._sources[name]
        found = []
        if faults := [info for info in source.infos if info.fault]:
            more = f" (and {len(faults) - 1} more of its tensors)" if len(faults) > 1 else ""
            where = f"{faults[0].name}: " if faults[0].name != name else ""
            return [Problem(name, f"{where}{faults[0].fault}{more}")]
        shape = (self._binding.experts.get(name, shape[0]), *shape[1:]) if shape else shape
        if source.shape != shape or source.broken:
            text = f"has shape {_shapes(source)} in the checkpoint, the model expects {list(shape)}"
            found.append(Problem(name, text))
        for kind in dict.fromkeys(info.type for info in source.infos):
            if not source.computes(kind):
                found.append(Problem(name, f"stored as {kind.name}, not computed yet; {_OTHER[self.format]}"))
        return found

    def _unused(self, ignore_unexpected: Iterable[str]) -> list[str]:
        used = {name for source in self._sources.values() for name in source.names} | self._binding.harmless
        patterns = [re.compile(pattern) for pattern in (*self._binding.ignored, *ignore_unexpected)]
        return [n for n in self.files.names() if n not in used and not any(p.search(n) for p in patterns)]

    def close(self) -> None:
        self.files.close()

    def __deepcopy__(self, memo: dict) -> "ModelWeights":
        """A copied model without operators reads nothing more from the files, so both may hold them."""
        return self

    def __reduce_ex__(self, protocol: object) -> object:
        raise UnsupportedError(
            f"{self.path}: open weights are mapped files and cannot be pickled. Save the model with "
            "save_pretrained, or set its `gguf_loader` to None first."
        )

    def __repr__(self) -> str:
        return (
            f"ModelWeights({len(self._sources)} tensors from {len(self.files.paths)} {self.format} file(s))"
        )


_OTHER = {
    "gguf": "use another quantization",
    "safetensors": "save the model as bfloat16 with transformers (save_pretrained), or use a GGUF file of it",
}
"""What to do about a stored type that is not computed, by the checkpoint's format."""


def _shapes(source: Source) -> str:
    """The shape of a source, or the shapes of its parts when they do not fit together."""
    if not source.broken:
        return str(list(source.shape))
    return " and ".join(dict.fromkeys(str(list(info.shape)) for info in source.infos))


class _Binding:
    """What binding finds: sources by module name, and what to say about everything else."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.absent: dict[str, str] = {}  # why a module's tensor could not be made
        self.harmless: set[str] = set()  # checkpoint names that are neither used nor a problem
        self.ignored: list[str] = []  # regular expressions of such names
        self.transposed: set[str] = set()  # expert weights that the model holds as [E, K, N]
        self.experts: dict[str, int] = {}  # expert weights of more experts than are computed -> how many are
        self.interleaved: set[str] = set()  # those whose rows are gate and up in turn
        self.notes: list[str] = []  # problems with no tensor of their own


def bind(files: WeightFiles, model: torch.nn.Module) -> ModelWeights:
    """Match a checkpoint to a transformers model (usually on the meta device), without reading tensor data.

    Raises UnsupportedError for a family or a conversion this version does not know and WeightError for a file
    of another family. What is missing, unused or misshapen is told by `ModelWeights.problems`.
    """
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    binding = _Binding()
    binding.ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    (_bind_gguf if files.format == "gguf" else _bind_safetensors)(files, model, shapes, binding)
    _keep_whole_numbers(state, binding)
    _share_tied(model, binding)
    return ModelWeights(files, binding)


def _keep_whole_numbers(state: dict[str, Tensor], binding: _Binding) -> None:
    """Deliver integers and flags as they are where the model holds such, in a type that the stored one fits."""
    for name, source in binding.sources.items():
        wanted = state[name].dtype
        if isinstance(source.infos[0].type, ScaledType):
            continue
        stored = WHOLE_NUMBERS.get(source.infos[0].type.name)
        if type(source) is not Plain or wanted.is_floating_point or wanted.is_complex or stored is None:
            continue
        if torch.promote_types(stored, wanted) == wanted:
            binding.sources[name] = WholeNumbers(source.files, source.names[0], source.shape)


def _share_tied(model: torch.nn.Module, binding: _Binding) -> None:
    """Let a tied tensor that the checkpoint leaves out be delivered from the one it is tied to."""
    tied = getattr(model, "_tied_weights_keys", None)
    if getattr(model.config, "tie_word_embeddings", False) and isinstance(tied, dict):
        for name, origin in tied.items():
            if name not in binding.sources and origin in binding.sources:
                binding.sources[name] = binding.sources[origin]
                binding.absent.pop(name, None)


def _extra_layers(config, stated: object = None) -> range:
    """Layers after the model's own: multi-token prediction, which transformers does not build. `stated`: how many a
    file says it has."""
    config = config.get_text_config()
    layers, known = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    more = min(stated, 1000) if type(stated) is int else 0
    return range(layers, layers + max(known, more))


# --- safetensors ------------------------------------------------------------------------------------------


OTHER_MODALITIES = r"^(model\.)?(visual|vision|audio|multi_modal_projector|mm_projector)[a-z_]*\."
"""Parts of a multimodal checkpoint that a model of its text alone leaves aside."""


def _bind_safetensors(files: WeightFiles, model, shapes: Shapes, binding: _Binding) -> None:
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
        if _merges_experts(converter):
            _add_stacked(files, target, converter, parts, shapes, binding)
        else:
            _add_converted(files, target, converter, parts, model, binding)
    binding.ignored += [r"rotary_emb\.inv_freq$", companions.IGNORED]
    if model.config is model.config.get_text_config():
        binding.ignored.append(OTHER_MODALITIES)
    binding.ignored += [rf"^(model\.)?layers\.{n}\." for n in _extra_layers(model.config)]


def _find_layouts(model, binding: _Binding) -> None:
    """Note which experts have other layouts than [E, N, K] of all experts with gate before up."""
    for prefix, module in model.named_modules():
        if not TRAITS["experts"](module):
            continue
        names = [f"{prefix}.{name}" for name in ("gate_up_proj", "down_proj")]
        if is_transposed(module):
            binding.transposed.update(names)
        if is_interleaved(module):
            binding.interleaved.add(names[0])
        if idle_experts(module):
            binding.experts[names[0]] = len(module.down_proj)


def _is_idle_bias(files: WeightFiles, key: str) -> bool:
    """Whether `key` is a bias of zeros beside quantized codes: AutoGPTQ writes one for layers that have none."""
    weight = f"{key.removesuffix('bias')}weight"
    if not key.endswith(".bias") or weight not in files or not isinstance(files.info(weight).type, ScaledType):
        return False
    return not files.packed(key).data.any()


def _natural(key: str) -> str:
    """Sorts layer 10 after layer 9."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), key)


def _add_plain(files: WeightFiles, key: str, target: str, shapes: Shapes, binding: _Binding) -> None:
    if target in binding.sources:
        binding.notes.append(
            f"{target}: both {binding.sources[target].names[0]} and {key} in the checkpoint name it"
        )
        binding.harmless.add(key)
    elif target in binding.transposed:
        binding.sources[target] = (Transposed if _is_stack_of_rows(files.info(key)) else Exchanged)(files, key)
    else:
        binding.sources[target] = Plain(files, key, shapes[target])


def _is_stack_of_rows(info: TensorInfo) -> bool:
    return isinstance(info.type, ScaledType) and len(info.shape) == 3


def _merges_experts(converter) -> bool:
    """Whether a conversion stacks the experts, then perhaps puts gate on top of up. Such weights stay packed."""
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    merges = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    return merges and len(converter.target_patterns) == 1


def _add_converted(
    files: WeightFiles, target: str, converter, parts: dict[str, list[str]], model, binding: _Binding
) -> None:
    """Bind every result of a conversion that only transformers knows; `target` is the name of one of them."""
    found = next(pattern for pattern in converter.target_patterns if pattern in target)
    for pattern in converter.target_patterns:
        binding.sources[target.replace(found, pattern)] = Converted(files, parts, converter, pattern, model)


def _expert_index(key: str, pattern: str) -> int:
    index = key.removesuffix(pattern.rpartition("*")[2]).rpartition(".")[2]
    if not re.fullmatch("[0-9]{1,9}", index):
        raise UnsupportedError(
            f"{key}: no expert number where transformers' pattern {pattern!r} has one. Report this name."
        )
    return int(index)


def _add_stacked(
    files: WeightFiles, target: str, converter, keys: dict[str, list[str]], shapes: Shapes, binding: _Binding
) -> None:
    """Bind per-expert matrices to a stacked parameter; note which of the E that it needs are missing."""
    parts = [(p, {_expert_index(key, p): key for key in keys.get(p, ())}) for p in converter.source_patterns]
    if target in binding.experts:  # those of idle experts may be there too
        binding.harmless.update(key for found in keys.values() for key in found)
    count = binding.experts.get(target, shapes[target][0])
    missing = [
        pattern.replace("*", str(e)) for pattern, found in parts for e in range(count) if e not in found
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        binding.absent[target] = (
            f"incomplete in the checkpoint, which lacks ...{', '.join(missing[:3])}{more}"
        )
        binding.harmless.update(name for _, found in parts for name in found.values())
        return
    names = [tuple(found[e] for e in range(count)) for _, found in parts]
    if target in binding.sources:
        binding.notes.append(f"{target}: stacked and per expert in the checkpoint")
    binding.sources[target] = Stacked(files, names)


# --- GGUF -------------------------------------------------------------------------------------------------


def _bind_gguf(files: WeightFiles, model, shapes: Shapes, binding: _Binding) -> None:
    config = model.config
    family = gguf_names.family_of(files.metadata.get("general.architecture"), config.model_type)
    binding.notes += _metadata_mismatches(files.metadata, family.arch, config)
    if family.in_turn:
        binding.interleaved.update(name for name in shapes if name.endswith(".experts.gate_up_proj"))
    for name, shape in shapes.items():
        source, looked_for = _gguf_source(files, family, config, name, shape)
        if source is not None:
            binding.sources[name] = source
        else:
            binding.absent[name] = f"missing in the checkpoint, looked for {looked_for}"
    binding.ignored.append(gguf_names.IGNORED.pattern)
    predicting = files.metadata.get(f"{family.arch}.nextn_predict_layers")
    binding.ignored += [rf"^blk\.{n}\." for n in _extra_layers(config, predicting)]
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
            return Laid(files, names, how, shape, config), stored
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
    source = StackedColumns(files, parts, family.in_turn) if family.columns else Stacked(files, parts)
    return source, " and ".join(looked_for)


def _metadata_mismatches(metadata: dict, arch: str, config) -> list[str]:
    """Numbers that the file and the config both give and do not agree on."""
    notes = []

    def compare(key: str, stored: object, attribute: str, *also: int) -> None:
        wanted = getattr(config, attribute)
        if type(stored) is int and stored != wanted and stored not in also:
            notes.append(f"{arch}.{key} is {stored} in the GGUF file, the config has {attribute} {wanted}")

    stated = metadata.get(f"{arch}.nextn_predict_layers")
    extra = len(_extra_layers(config, stated))  # files may count the prediction layers that they leave out, or not
    layers = config.num_hidden_layers
    compare("block_count", metadata.get(f"{arch}.block_count"), "num_hidden_layers", layers + extra)
    for key, attributes in gguf_names.CHECKS:
        attribute = next((a for a in attributes if getattr(config, a, None) is not None), None)
        if attribute:
            compare(key, metadata.get(f"{arch}.{key}"), attribute)
    return notes
