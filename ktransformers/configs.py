"""A model's config from wherever a user points to, and its meta model: the two things that planning starts from.

Nothing here opens safetensors, downloads, or runs code from a model's repository. transformers is imported inside the
functions: it takes a second.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ktransformers.errors import KTransformersError, UnsupportedError, did_you_mean, is_whole
from ktransformers.paths import existing_path

_MOST_BYTES = 16 << 20
"""Of a config.json. The largest published ones have some 100 KB; a file of weights given by mistake is not read."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_NEEDED = ("hidden_size", "num_attention_heads")
_OPTIONAL = (  # 0 says that there is none
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim", "num_key_value_heads",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim",
    "index_n_heads",
)  # fmt: skip
_LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_LAYERS, (1, 10_000)),
    **dict.fromkeys(_NEEDED, (1, 1 << 20)),
    **dict.fromkeys(_OPTIONAL, (0, 1 << 20)),
    **dict.fromkeys(_EXPERTS, (1, 1 << 16)),
    **dict.fromkeys(_CHOSEN, (0, 1 << 16)),
    "vocab_size": (1, 1 << 26),
    "max_position_embeddings": (1, 1 << 31),
}
"""Field that sizes a model -> the smallest and the largest number that are no mistake. Each layer takes time to build
and memory in lists with one value per layer, so this is checked before transformers sees the numbers."""

_HOW = {"attn_implementation", "experts_implementation"} | {"_attn_implementation", "_experts_implementation"}
"""Fields that say how to compute, not what: a name there can ask for a library that is missing, or for a download."""

OR_RUN_ITS_CODE = (
    "or build config, model and tokenizer with trust_remote_code=True in a program of your own and call "
    "optimize_and_load"
)
"""The other next step where only code from a model's repository would do."""


# --- config -----------------------------------------------------------------------------------------------


def read_config(model: str | Path) -> Any:
    """The transformers config of `model`: a folder with config.json, the JSON file itself, a .gguf, or a known name.

    A path that exists is read, whatever known model has the same name. ``config.name_or_path`` is the folder, or the
    repository of a known model.

    Raises:
        KTransformersError: nothing there, a file that cannot be read, or sizes that no model has.
        UnsupportedError: a model type that transformers lacks, or that only code from the model's repository builds.
        WeightError: a damaged .gguf.
    """
    from ktransformers.models.known import find_known, known_config

    name, path = str(model), model_path(model)
    if path is None:
        if find_known(name):
            return known_config(name)
        raise _nothing_there(name)
    if path.is_dir():
        return _from_file(_config_in(path), path)
    if path.suffix.lower() == ".gguf":
        from ktransformers.gguf_files.config import config_from_gguf

        return config_from_gguf(path)
    return _from_file(path, path.parent)


def text_config(config: Any) -> Any:
    """The part of `config` that describes the language model: itself, unless the model has other towers too."""
    return config.get_text_config(decoder=True)


def model_path(model: str | Path) -> Path | None:
    """The path that `model` is, or None where there is nothing."""
    try:
        return existing_path(model, "model") if str(model).strip() else None
    except KTransformersError:  # no file can have this name, or ~user is nobody
        return None


def _nothing_there(model: str) -> KTransformersError:
    from ktransformers.models.known import did_you_mean_known

    path = Path(model)
    hint = did_you_mean_known(model)
    if not hint and (parent := model_path(path.parent)) is not None:
        hint = did_you_mean(path.name, _names_in(parent))
    return KTransformersError(
        f"model {model[:200]!r}: no such folder or file, and no known model of that name{hint}. Give a folder with "
        "config.json, that file, a .gguf, or the name of a known model (`kt list models`)."
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:  # a file, or not for us to see
        return []


def _config_in(folder: Path) -> Path:
    """The config.json of a folder; an error says what the folder has instead."""
    names = _names_in(folder)
    if "config.json" in names:
        return folder / "config.json"
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    step = f"Give {folder / gguf[0]}" if gguf else "Give a Hugging Face model folder, a .gguf, or a known model's name"
    raise KTransformersError(f"{folder}: no readable config.json. {step}.")


def _from_file(path: Path, folder: Path) -> Any:
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise KTransformersError(
            f"{path}: model_type is {'missing' if model_type is None else repr(model_type)}, expected a name such as "
            "'qwen3_moe'. Give the config.json of a model, not of its tokenizer or its generation."
        )
    _check_type(path, fields, model_type)
    if problems := list(_absurd(fields)):
        raise KTransformersError(f"{path}: no model has these sizes: {'; '.join(problems)}. Correct the file.")
    fields = {name: value for name, value in _without_how(fields).items() if name != "_name_or_path"}
    return _build(path, {**fields, "name_or_path": str(folder)}, model_type)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise KTransformersError(
                f"{path}: not a file, or too large for a config.json, which has some kilobytes. Give the model's "
                "folder, its config.json or a .gguf."
            )
        fields = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_float_or_object)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise KTransformersError(
            f"{path}: cannot be read as JSON: {error}. Download it again, or give another file."
        ) from error
    if not isinstance(fields, dict):
        raise KTransformersError(
            f"{path}: found a {type(fields).__name__}, expected an object with model_type and sizes. Give the model's "
            "config.json."
        )
    return fields


def _float_or_object(found: dict[str, Any]) -> Any:
    """How transformers writes numbers that JSON has not: ``{"__float__": "Infinity"}``."""
    text = found.get("__float__")
    return float(text) if len(found) == 1 and text in ("Infinity", "-Infinity", "NaN") else found


def _check_type(path: Path, fields: dict[str, Any], model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ktransformers.models import register_families

    register_families()
    if model_type in CONFIG_MAPPING:
        return
    if fields.get("auto_map"):
        raise UnsupportedError(
            f"{path}: transformers does not know model type {model_type!r}, only code from the model's own repository "
            "does, and that is not run. Use a release of transformers that has the model, "
            f"{OR_RUN_ITS_CODE}."
        )
    raise UnsupportedError(
        f"{path}: transformers has no model of type {model_type!r}{did_you_mean(model_type, CONFIG_MAPPING)}. Correct "
        "model_type, or use a release of transformers that has the model."
    )


def _without_how(fields: dict[str, Any]) -> dict[str, Any]:
    kept = ((name, value) for name, value in fields.items() if name not in _HOW)
    return {name: _without_how(value) if isinstance(value, dict) else value for name, value in kept}


def _build(path: Path, fields: dict[str, Any], model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # transformers and what it validates with raise many kinds
        raise KTransformersError(
            f"{path}: not a valid {model_type} config: {_reason(error)}. Correct the file, or download it again."
        ) from error


def _reason(error: Exception) -> str:
    """The first two lines of what transformers says; more is its own internals."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".")


# --- sizes ------------------------------------------------------------------------------------------------


def _absurd(fields: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with the sizes of a config and of the configs in it, one clause each."""
    dense = any(fields.get(name) == 0 for name in _CHOSEN)  # member of a family with experts that has none
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _absurd(value, f"{where}{name}.")
        elif name in _LIMITS and value is not None:
            least, most = _LIMITS[name]
            if isinstance(value, list) or dense and name in _EXPERTS:  # a list has a number for each layer
                least = 0
            yield from _out_of_range(where + name, value if isinstance(value, list) else [value], least, most)
    chosen, experts = ([fields[n] for n in names if is_whole(fields.get(n))] for names in (_CHOSEN, _EXPERTS))
    if chosen and experts and max(chosen) > max(experts) > 0:
        yield f"{where or 'the model '}chooses {max(chosen)} of {max(experts)} experts"


def experts_problem(model: Any) -> str:
    """Why no token can be routed: the model's config chooses more experts than there are. "" where it can.

    `read_config` says so of a file; this is for configs from elsewhere, such as a .gguf or a program.
    """
    config = text_config(model.config) if hasattr(model.config, "get_text_config") else model.config
    chosen, there = (
        max((value for name in names if is_whole(value := getattr(config, name, None))), default=0)
        for names in (_CHOSEN, _EXPERTS)
    )
    if not chosen > there > 0 or not any(name.endswith(".experts") for name, _ in model.named_modules()):
        return ""  # a family with experts may have members without
    return f"the model chooses {chosen} of {there} experts for each token. Correct the numbers in its config"


def _out_of_range(name: str, values: list[Any], least: int, most: int) -> Iterator[str]:
    for value in values:
        if not is_whole(value, least, most):
            yield f"{name} is {repr(value)[:40]}, expected a whole number from {least} to {most:,}"
            return


# --- meta model -------------------------------------------------------------------------------------------


def meta_model(config: Any) -> Any:
    """The language model of `config` on the meta device: every module and shape, no memory, in a tenth of a second.

    Its class is the one that `ktransformers.models.builder` names. `config` is left as it is; the model has a copy. The
    first model of a family takes seconds of imports more.

    Raises:
        UnsupportedError: transformers has no class for this config that continues text.
        KTransformersError: the config's numbers contradict each other.
    """
    import torch

    from ktransformers.models import builder

    name = getattr(config, "name_or_path", "") or "model"
    found = builder(config)
    if found is None:
        raise UnsupportedError(
            f"{name}: transformers has no model of type {config.model_type!r} that continues text token by token (a "
            "causal LM, or one that takes images or sounds too). Give a language model."
        )
    auto, part = found
    try:
        with torch.device("meta"):
            # False, not left out: transformers would ask on the terminal whether to run the repository's code.
            model = auto.from_config(copy.deepcopy(part), trust_remote_code=False)
    except Exception as error:  # whatever a family's constructor does with numbers that do not fit each other
        raise KTransformersError(
            f"{name}: transformers cannot build {config.model_type} from this config: {_reason(error)}. Correct the "
            "numbers that it names in config.json."
        ) from error
    if problem := experts_problem(model):
        raise KTransformersError(f"{name}: {problem}.")
    model.config.name_or_path = getattr(config, "name_or_path", "")  # a part of a config does not know its folder
    return model
