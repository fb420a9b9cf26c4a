"""What can be wrong before a model is touched: arguments, a checkpoint for the model, rules for the checkpoint.

Reads names, shapes and types, no tensor data. Rules are checked where they are parsed (`ktransformers.rules`), files
where they are opened (`ktransformers.loaders`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransformers.configs import experts_problem
from ktransformers.errors import DeviceError, KTransformersError, RuleError, WeightError, join_errors
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.rules.plan import Replacement, operator_problems


def check_arguments(model: Any, default_device: Any, devices: Any) -> None:
    """Refuse what is no model, a model with operators in it or too few experts, and what names no device."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise KTransformersError(
            f"model: found {type(model).__name__}, expected a transformers model, such as "
            "AutoModelForCausalLM.from_config(config)."
        )
    if any(isinstance(module, BaseInjectedModule) for module in model.modules()):
        raise KTransformersError(
            "model: operators are in it already. Build it again on the meta device, then optimize it once."
        )
    if problem := experts_problem(model):
        raise KTransformersError(f"config: {problem}, and build the model again.")
    if not isinstance(default_device, (str, torch.device, type(None))):
        raise DeviceError(
            f"default_device: found {default_device!r}, expected a name such as 'cpu' or 'cuda:0', or None."
        )
    named = isinstance(devices, Mapping) and all(isinstance(n, str) for pair in devices.items() for n in pair)
    if devices is not None and not named:
        raise DeviceError(f"devices: found {devices!r}, expected a mapping of device names, such as {{'cuda': 'cpu'}}.")


def checkpoint_of(config: Any) -> Path:
    """The local folder that a config was read from."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or not Path(name).is_dir():
        raise WeightError(
            f"weights: not given, and the config was not read from a local folder (found {name!r}). "
            "Pass weights=<folder, .safetensors or .gguf>."
        )
    return Path(name)


def check_weights(model: nn.Module, source: Any) -> None:
    """Compare the checkpoint's names and shapes with the whole model's; reads no tensor data."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []:
        expected = {name: shape for name, shape in expected.items() if source.has(name) or not re.search(pattern, name)}
    ignore = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if problems := source.problems(expected, ignore):
        raise join_errors(
            WeightError, f"{source.path} does not fit {type(model).__name__}, nothing was loaded:", problems
        )


def check_operators(model: nn.Module, replacements: Mapping[str, Replacement], source: Any) -> None:
    """Ask the operators again, now that the types of their tensors are known."""
    if problems := operator_problems(model, replacements, source):
        raise join_errors(RuleError, f"the rules do not fit {source.path}, nothing was loaded:", problems)
