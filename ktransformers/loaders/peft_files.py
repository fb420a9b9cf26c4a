"""PEFT's adapter folders, read and written without PEFT: adapter_config.json and adapter_model.safetensors.

Tensors are named by where PEFT's wrappers put them: `base_model.model.` before the module's name, `.base_layer` for
each wrapper that stands around another. Which parameter of the experts a nested wrapper adapts follows from the order
in which PEFT meets them, the model's own.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean, join_errors
from ktransformers.loaders import open_weights
from ktransformers.loaders.base import WeightFiles
from ktransformers.loaders.lora import Adapter, LowRank, Place, from_peft, places, to_peft
from ktransformers.loaders.schemes import read_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?"
)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "fan_in_fan_out": (False,),
    "use_qalora": (False,), "layer_replication": (), "trainable_token_indices": (), "alora_invocation_tokens": (),
    "use_bdlora": (False,), "arrow_config": (), "kasa_config": (), "velora_config": (), "monteclora_config": (),
}  # fmt: skip
"""Settings of LoraConfig that make more of an adapter than B @ A, and the values with which they do not."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")
"""Values of `init_lora_weights` that took something out of the base before training."""


# --- reading ------------------------------------------------------------------------------------------------


def is_adapter_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`, checked. Raises WeightError, or UnsupportedError for what is no plain LoRA."""
    if (settings := read_config(folder / CONFIG)) is None:
        raise WeightError(f"{folder}: no {CONFIG} in it. Give the folder that PEFT's save_pretrained wrote.")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{folder / CONFIG}: peft_type is {kind!r}, expected 'LORA'. Leave it to PEFT alone.")
    for name, values in _PLAIN.items():
        if (value := settings.get(name)) not in (None, *values):
            raise UnsupportedError(
                f"{folder / CONFIG}: {name} is {value!r:.60}, with which an adapter is more than two factors. Merge it "
                "with PEFT's merge_and_unload on transformers' model."
            )
    alphas = {"lora_alpha": settings.get("lora_alpha", 8), **(settings.get("alpha_pattern") or {})}
    if wrong := [name for name, value in alphas.items() if not isinstance(value, (int, float))]:
        raise WeightError(f"{folder / CONFIG}: alpha of {wrong[0]!r} is {alphas[wrong[0]]!r:.60}, expected a number.")
    return settings


def _check_initial(folder: Path, settings: dict[str, Any]) -> None:
    how = settings.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"{folder / CONFIG}: init_lora_weights is {how!r}, for which the base was changed before training. Save "
            "the adapter with path_initial_model_for_weight_conversion, as PEFT's documentation tells."
        )


def read_peft(folder: Path, model: nn.Module) -> Adapter:
    """The adapter in `folder`, by the names of `model`, usually on the meta device.

    Raises WeightError with every tensor that the model has no place for, or another shape.
    """
    settings = read_settings(folder)
    _check_initial(folder, settings)
    if not (folder / WEIGHTS).is_file():
        raise WeightError(f"{folder}: no {WEIGHTS} in it. Load the adapter with PEFT and save it again.")
    adapter = Adapter(folder, settings.get("lora_alpha", 8))
    with open_weights(folder / WEIGHTS) as files:
        problems = _Reading(files, settings, model, adapter).all()
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        base = settings.get("base_model_name_or_path")
        trained = f" It was trained on {base}." if base else ""
        raise join_errors(WeightError, f"{folder}: the adapter does not fit the model.{trained}", shown)
    return adapter


@dataclass
class _Reading:
    files: WeightFiles
    settings: dict[str, Any]
    model: nn.Module
    adapter: Adapter

    def all(self) -> list[str]:
        """Fill the adapter; returns what does not fit."""
        problems: list[str] = []
        self.places = places(self.model)
        self.state = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        pairs: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for stored in self.files.names():
            name = stored.removeprefix(_PREFIX)
            if found := _FACTOR.fullmatch(name):
                depth = found["nested"].count(".base_layer")
                pairs[found["module"], depth][found["which"]] = stored
            elif name in self.state:
                problems += self._replaced(stored, name)
            elif ".base_layer." not in name:  # PEFT saves the table under an embedding's adapter, too
                problems.append(f"{stored}: the model has no {name}{did_you_mean(name, self.state)}")
        for (module, depth), stored in pairs.items():
            problems += self._pair(module, depth, stored)
        if not problems and not self.adapter.changes and not self.adapter.replaced:
            problems.append("it holds no tensor")
        return problems

    def _replaced(self, stored: str, name: str) -> list[str]:
        shape = self.files.info(stored).shape
        if shape != self.state[name]:
            return [f"{stored} is {list(shape)}, the model's is {list(self.state[name])}"]
        self.adapter.replaced[name] = self.files.tensor(stored)
        return []

    def _pair(self, module: str, depth: int, stored: dict[str, str]) -> list[str]:
        if len(stored) < 2:
            return [f"{next(iter(stored.values()))}: without its other factor"]
        found = self._place(module, depth)
        if isinstance(found, str):
            return [f"{stored['A']}: {found}"]
        a, b = (self.files.tensor(stored[which]) for which in "AB")
        if found.embedding:
            a, b = b.T, a.T  # lora_embedding_A [r, rows], lora_embedding_B [columns, r]
        count = found.shape[0] if len(found.shape) == 3 else 1
        whole = a.dim() == b.dim() == 2 and a.numel() and b.numel()
        if not whole or (count > 1 and (a.shape[0] % count or b.shape[1] % count)):
            return [f"{stored['A']} {list(a.shape)} and {list(b.shape)} are no factors of {list(found.shape)}"]
        if len(found.shape) == 3:
            a, b = from_peft(a, b, count, found.exchanged)
        change = LowRank(a, b, self._scale(found, a.shape[-2]), found.embedding)
        if change.shape != found.shape or a.shape[-2] != b.shape[-1]:
            made = f"{list(change.shape)}, of ranks {a.shape[-2]} and {b.shape[-1]}"
            return [f"{stored['A']}: it and B make {made}, the model's {found.name} is {list(found.shape)}"]
        self.adapter.changes[found.name] = change
        return []

    def _place(self, module: str, depth: int) -> Place | str:
        """What the wrapper `depth` deep around `module` adapts, or why nothing."""
        if depth == 0 and (found := self.places.get(f"{module}.weight")):
            return found
        own = [place for place in self.places.values() if place.module == module]
        if not own:
            hint = did_you_mean(module, {place.module for place in self.places.values()})
            if re.search(r"\.experts\.\d+\.", module):
                hint = "; it was made before transformers 5 stacked experts: load it with PEFT, and save it again"
            return f"the model has no matrix in {module}{hint}"
        wanted = self.settings.get("target_parameters") or []
        own = [one for one in own if any(one.name == t or one.name.endswith(f".{t}") for t in wanted)] or own
        if depth >= len(own):
            return f"target_parameters name {len(own)} parameters of {module}, and this is one more"
        return own[len(own) - 1 - depth]

    def _scale(self, place: Place, rank: int) -> float:
        alpha = _by_pattern(self.settings.get("alpha_pattern"), place.key, self.adapter.alpha)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, key: str, default: float) -> float:
    """What PEFT finds for `key`: the first pattern that is the end of it."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", key):
                return float(value)
        except re.error as error:
            raise WeightError(f"{CONFIG}: alpha_pattern {pattern!r} is no regular expression: {error}.") from error
    return float(default)


# --- writing ------------------------------------------------------------------------------------------------


def write_peft(adapter: Adapter, folder: Path, model: nn.Module, base: str = "") -> None:
    """Write `adapter` as PEFT would, so that stock PEFT loads it. Raises WeightError where it cannot be written."""
    from safetensors.torch import save_file

    every = _as_targets(places(model), model)
    changed = [every[name] for name in adapter.changes]
    tensors = {_PREFIX + name: tensor for name, tensor in adapter.replaced.items()}
    rank = Counter(change.rank for change in adapter.changes.values()).most_common(1)[0][0]
    scale = adapter.alpha / rank
    order = {name: number for number, name in enumerate(every)}
    for place in sorted(changed, key=lambda place: order[place.name]):
        later = [p for p in changed if p.module == place.module and order[p.name] > order[place.name]]
        tensors.update(_factors(adapter.changes[place.name], place, scale, ".base_layer" * len(later)))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "bias": "none",
        "inference_mode": True, "r": rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0,
        "rank_pattern": {p: r for p, r in _patterns(adapter, changed) if r != rank},
        "alpha_pattern": {p: scale * r for p, r in _patterns(adapter, changed) if r != rank},
        **_targets(changed, every), "modules_to_save": _modules(adapter.replaced) or None,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise WeightError(f"{folder}: cannot be written ({error}). Choose another place.") from error


_TAKEN = ("gate", "gate_proj", "up_proj", "down_proj")
"""Names that PEFT takes for the experts' in families whose checkpoints name those so, as Qwen2-MoE's does."""


def _as_targets(every: dict[str, Place], model: nn.Module) -> dict[str, Place]:
    """The places, of which linear layers with a name that PEFT would take for the experts' are parameters to it."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as KINDS  # as PEFT asks

    if KINDS.get(model.config.model_type) != "qwen2_moe":
        return every
    return {n: replace(p, parameter=p.parameter or p.module.rpartition(".")[2] in _TAKEN) for n, p in every.items()}


def _factors(change: LowRank, place: Place, scale: float, nested: str) -> Iterator[tuple[str, Tensor]]:
    a, b = change.a, change.b if change.scale == scale else change.b.float() * (change.scale / scale)
    if place.embedding:
        a, b = b.T, a.T
    elif len(place.shape) == 3:
        a, b = to_peft(a, b, place.exchanged)
    kind = "lora_embedding_{}" if place.embedding else "lora_{}.weight"
    for which, factor in (("A", a), ("B", b)):
        yield f"{_PREFIX}{place.module}{nested}.{kind.format(which)}", factor.clone().contiguous()


def _patterns(adapter: Adapter, changed: list[Place]) -> Iterator[tuple[str, int]]:
    for place in changed:
        yield f"^{re.escape(place.key)}", adapter.changes[place.name].rank


def _targets(changed: list[Place], every: dict[str, Place]) -> dict[str, list[str]]:
    def named(parameter: bool, words: int) -> list[str]:
        keys = [[p.key for p in some if p.parameter is parameter] for some in (changed, every.values())]
        return _shortened(*keys, words)

    return {"target_modules": named(False, 1), "target_parameters": named(True, 2)}


def _shortened(names: list[str], every: list[str], words: int) -> list[str]:
    """Names as their last `words`, where all of the model's that end so are meant."""
    short: Callable[[str], str] = lambda name: ".".join(name.split(".")[-words:])  # noqa: E731
    meant, found = set(names), {}
    for name in names:
        end = short(name)
        whole = all(other in meant for other in every if short(other) == end)
        found[end if whole else name] = None
    return sorted(found)


def _modules(replaced: dict[str, Tensor]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in replaced})
