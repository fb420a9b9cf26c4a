"""Training files: a YAML mapping, each key of which is understood or an error.

A key is one of `Options`, one of transformers' TrainingArguments, which is passed on, or one that changes nothing here,
which is said.
"""

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ktransformers.errors import SFTError, did_you_mean, is_whole, join_errors
from ktransformers.sft.options import LOSSES, REFUSED, STAGES, TUNINGS, UNUSED, Options


def read(path: str, changes: Sequence[str] = ()) -> Options:
    """The options of a YAML file, with ``key=value`` of `changes` on top. Raises SFTError with all that is wrong."""
    given = _mapping(path)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SFTError(f"{change}: found no =, expected key=value, such as max_steps=10.")
        given[key.strip()] = _yaml(value, change)
    return made_of(given, path)


def made_of(given: dict[str, Any], where: str = "options") -> Options:
    """`Options` of a mapping. Raises SFTError that lists every problem."""
    config = given.get("kt_config") or {}
    if isinstance(config, dict):
        flat = {name if name.startswith("kt_") or name in _OWN else f"kt_{name}": v for name, v in config.items()}
        given = flat | given
    passed_on, options, problems = _training_arguments(), Options(), []
    for key, value in given.items():
        if key in REFUSED:
            if value not in (None, False, "", 0):
                problems.append(f"{key}: {value!r} is not supported: {REFUSED[key]}; leave it out")
        elif key in _OWN:
            problem = _set(options, key, value)
            problems += [problem] if problem else []
        elif key in passed_on:
            if value is not None:
                options.passed[key] = _meant(key, value, passed_on[key])
        elif key in UNUSED:
            reason = f": {UNUSED[key]}" if UNUSED[key] else ""
            options.notices.append(f"{key} changes nothing here{reason}")
        else:
            known = (*_OWN, *passed_on, *UNUSED)
            problems.append(f"{key}: unknown key{did_you_mean(key, known)}")
    problems += _contradictions(options)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise join_errors(SFTError, f"{where}: {count}", problems)
    return options


_OWN = {f.name: f for f in fields(Options) if f.name not in ("passed", "notices")}
_TYPES = typing.get_type_hints(Options)


def _mapping(path: str) -> dict[str, Any]:
    file = Path(path)
    if file.is_dir() or not file.exists():
        found = "is a folder" if file.is_dir() else "no such file"
        raise SFTError(f"{path}: {found}; expected a YAML file, see tutorials/08_sft.md for one.")
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SFTError(f"{path}: cannot be read: {error}. Expected a YAML file.") from error
    found = _yaml(text, path)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SFTError(f"{path}: found {type(found).__name__}, expected lines of key: value.")
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SFTError(f"{where}: is no YAML: {' '.join(str(error).split())}") from error


def _training_arguments() -> dict[str, str]:
    """Fields of transformers' TrainingArguments and the text of their types, without those that are options here."""
    from transformers import TrainingArguments

    kept = [f for f in fields(TrainingArguments) if f.name not in _OWN and f.name not in REFUSED]
    return {f.name: str(f.type) for f in kept}


def _meant(key: str, value: Any, kind: str) -> Any:
    """YAML reads `save_strategy: no` as false, and 1e-4 as text."""
    if value is False and key.endswith("_strategy"):
        return "no"
    return _number(value, kind)


def _number(value: Any, kind: str) -> Any:
    if isinstance(value, str) and ("float" in kind or "int" in kind):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(options: Options, key: str, value: Any) -> str:
    """Set an option of our own; says what is wrong with the value, or ``""``."""
    kind, default = _TYPES[key], getattr(options, key)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None:
        return ""
    if key in _LISTS and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if float in kinds:
        value = _number(value, "float")
        value = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if int in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        example = f", such as {default!r}" if default not in ("", None, {}) else ""
        return f"{key}: found {value!r}, expected {wanted}{example}"
    setattr(options, key, value)
    return ""


_LISTS = ("dataset", "eval_dataset", "lora_target", "additional_target", "adapter_name_or_path",
          "freeze_trainable_modules", "freeze_extra_modules")  # fmt: skip

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stage": (lambda v: v in STAGES, f"one of {', '.join(STAGES)}"),
    "finetuning_type": (lambda v: v in TUNINGS, f"one of {', '.join(TUNINGS)}"),
    "pref_loss": (lambda v: v in LOSSES, f"one of {', '.join(LOSSES)}"),
    "lora_rank": (lambda v: v > 0, "a positive number"),
    "cutoff_len": (lambda v: v > 1, "at least 2 tokens"),
    "lora_dropout": (lambda v: 0 <= v < 1, "a share below 1"),
    "val_size": (lambda v: v >= 0, "a share, or a number of examples"),
    "cpu_infer": (lambda v: v >= 0, "a number of threads"),
    "max_new_tokens": (lambda v: v > 0, "a positive number"),
    "infer_backend": (lambda v: v in ("ktransformers", "huggingface"), "ktransformers"),
    "warmup_ratio": (lambda v: 0 <= v < 1, "a share below 1"),
}


def _contradictions(options: Options) -> list[str]:
    wrong = [f"{key}: found {getattr(options, key)!r}, expected {wanted}" for key, (fits, wanted) in _CHECKS.items()
             if not fits(getattr(options, key))]  # fmt: skip
    if options.do_train and not options.dataset:
        wrong.append("dataset: missing; name one of dataset_info.json in dataset_dir, or a file of JSON lines")
    if (options.do_train or options.do_predict) and not options.output_dir:
        wrong.append("output_dir: missing; name a folder for the adapter")
    if options.finetuning_type != "lora" and options.stage == "dpo" and options.pref_loss not in ("orpo", "simpo"):
        found = f"pref_loss {options.pref_loss} compares with the model without its adapter"
        wrong.append(f"finetuning_type: {found}; say lora, or pref_loss orpo or simpo")
    if options.finetuning_type != "lora" and options.adapter_name_or_path:
        wrong.append("adapter_name_or_path: an adapter goes on with finetuning_type lora alone")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        found = options.passed.get(key, 1)
        if not is_whole(found, 1):
            wrong.append(f"{key}: found {found!r}, expected a whole number of at least 1")
    if options.packing and options.stage == "dpo":
        wrong.append("packing: pairs are not packed; leave it out")
    return wrong
