"""The story: rules -> plan -> check -> inject -> load.

`optimize_and_load` turns a transformers model on the meta device into one that runs. Everything that can be wrong is
found before the model is touched; if loading fails after that (a full disk, Ctrl-C), the model is put back as it was.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransformers import env
from ktransformers.errors import (
    DeviceError,
    KTransformersError,
    RuleError,
    UnsupportedError,
    WeightError,
    join_errors,
)
from ktransformers.loaders import WeightSource, bind, held_as_stored, open_weights
from ktransformers.loaders.progress import load_progress
from ktransformers.models import kimi_k2  # noqa: F401  teaches transformers this model type
from ktransformers.operators import cpu_attention
from ktransformers.operators.base_operator import BaseInjectedModule, device_of, load_weights, warn_once
from ktransformers.rules.plan import Replacement, RulesLike, operator_problems, plan
from ktransformers.rules.table import print_plan


def optimize_and_load(
    model: nn.Module,
    rule: RulesLike,
    weights: str | Path | None = None,
    *,
    default_device: str | None = None,
    devices: Mapping[str, str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the modules that `rule` names by operators, then load every weight from the published checkpoint.

    Args:
        model: a transformers model built on the meta device; changed in place. Where its config has no dtype and
            none was given to ``from_config``, it takes the checkpoint's.
        rule: a path, the name of a packaged rule file, or the parsed list of rules.
        weights: a folder, a ``.safetensors`` or a ``.gguf`` file (the first of a split set); None is the local folder
            that the model's config was read from.
        default_device: of modules that no rule names; None is ``cuda:0`` where there is a GPU, else ``cpu``.
        devices: renames devices in the rules: ``{"cuda": "cpu"}`` runs a GPU's rules on a machine without one.
        progress: show a progress bar on standard error while loading, when that is a terminal.

    Returns:
        `model`, in eval mode, ready for `model.generate`.

    Raises:
        RuleError: rules that cannot be read or do not fit the model.
        WeightError: a damaged checkpoint, or tensors that are missing, unused or of the wrong shape.
        UnsupportedError: a valid checkpoint or operator that this version does not compute.
    """
    return _optimize_and_load(model, rule, weights, None, default_device, devices, progress)


def optimize_and_load_gguf(
    module: nn.Module,
    rule_file: RulesLike,
    gguf_path: str | Path,
    model_config: Any,
    default_device: str | None = None,
    *,
    devices: Mapping[str, str] | None = None,
) -> nn.Module:
    """`optimize_and_load` under upstream's name and argument order. `gguf_path` may be safetensors too."""
    return _optimize_and_load(module, rule_file, gguf_path, model_config, default_device, devices, True)


def _optimize_and_load(model, rule, weights, config, default_device, devices, progress) -> nn.Module:
    _check_arguments(model, default_device, devices)
    config = config or model.config
    with torch.device("cpu"):  # a caller may still be inside `with torch.device("meta")`
        return _run(model, rule, weights, config, default_device, devices, progress)


def _run(model, rule, weights, config, default_device, devices, progress) -> nn.Module:
    replacements = plan(model, rule, default_device=default_device, devices=devices)
    files = open_weights(weights if weights is not None else _checkpoint_of(config))
    try:
        source = bind(files, model)
        generation_config = _generation_config(config)
        check_weights(model, source)
        _check_operators(model, replacements, source)
        if env.debug():
            print_plan(model, replacements, source)
        named = set(model.state_dict())
        with _restored_on_failure(model), held_as_stored(model, files):
            keep_in_fp32(model)
            inject(model, replacements, source, config)
            _load(model, replacements, source, progress)
    except BaseException:
        files.close()
        raise
    model.gguf_loader = source  # upstream's name; also keeps the mapped files open while operators point into them
    model.hf_device_map = _device_map(model, replacements)
    model.generation_config = generation_config or model.generation_config
    _refuse_saving(model, source, named)
    if any(placed.device == "cpu" for placed in replacements.values()):
        cpu_attention.use(model)
    return model.eval()


def _check_arguments(model: Any, default_device: Any, devices: Any) -> None:
    """Refuse what is no model or device. Rules are checked where they are parsed, weights where they are opened."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise KTransformersError(
            f"model: found {type(model).__name__}, expected a transformers model, such as "
            "AutoModelForCausalLM.from_config(config)."
        )
    if any(isinstance(module, BaseInjectedModule) for module in model.modules()):
        raise KTransformersError(
            "model: operators are in it already. Build it again on the meta device, then optimize it once."
        )
    if not isinstance(default_device, (str, torch.device, type(None))):
        raise DeviceError(
            f"default_device: found {default_device!r}, expected a name such as 'cpu' or 'cuda:0', or None."
        )
    named = isinstance(devices, Mapping) and all(isinstance(n, str) for pair in devices.items() for n in pair)
    if devices is not None and not named:
        raise DeviceError(f"devices: found {devices!r}, expected a mapping of device names, such as {{'cuda': 'cpu'}}.")


def _checkpoint_of(config: Any) -> Path:
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or not Path(name).is_dir():
        raise WeightError(
            f"weights: not given, and the config was not read from a local folder (found {name!r}). "
            "Pass weights=<folder, .safetensors or .gguf>."
        )
    return Path(name)


# ---------------------------------------------------------------------------------------------------------------------
# Check
# ---------------------------------------------------------------------------------------------------------------------


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


def _check_operators(model, replacements, source) -> None:
    """Ask the operators again, now that the types of their tensors are known."""
    if problems := operator_problems(model, replacements, source):
        raise join_errors(RuleError, f"the rules do not fit {source.path}, nothing was loaded:", problems)


# ---------------------------------------------------------------------------------------------------------------------
# Inject
# ---------------------------------------------------------------------------------------------------------------------


def inject(model: nn.Module, replacements: Mapping[str, Replacement], source: Any, config: Any = None) -> None:
    """Swap in the operators: a setattr on the parent, parents before children."""
    for key, replacement in replacements.items():
        if replacement.operator is None:
            continue
        parent_name, _, child_name = key.rpartition(".")
        parent = model.get_submodule(parent_name)
        original = getattr(parent, child_name)
        setattr(parent, child_name, _build(replacement, source, config or model.config, original))


def _build(replacement: Replacement, source: Any, config: Any, original: nn.Module) -> nn.Module:
    arguments = (replacement.key, source, config, original)
    try:
        inspect.signature(replacement.operator).bind(*arguments, **replacement.kwargs)
    except TypeError as error:
        raise RuleError(
            f"{replacement.rule.where}: {replacement.operator.__name__} for {replacement.key} was not built with "
            f"kwargs {dict(replacement.kwargs)}: {error}. Its constructor is {inspect.signature(replacement.operator)}."
        ) from error
    operator = replacement.operator(*arguments, **replacement.kwargs)
    operator._is_hf_initialized = True  # transformers must not initialize it again
    return operator.train(original.training)


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put modules, parameters and buffers back as they were if the block raises, Ctrl-C included."""
    saved = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._modules, module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for table, before in saved:
            table.clear()
            table.update(before)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


def _load(model: nn.Module, replacements: Mapping[str, Replacement], source: Any, progress: bool) -> None:
    """Load every tensor once. Peak memory: the mapped files plus one tensor."""
    devices = {name: replacement.device for name, replacement in replacements.items()}
    with load_progress(source, enabled=progress):
        load_weights(model, source, "", devices)
    drop_replaced_tensors(model)
    tie(model, source)
    _fill_buffers(model, devices)
    left = [name for name, tensor in _named_tensors(model) if tensor.is_meta]
    if left:
        raise join_errors(WeightError, "tensors without a value after loading, please report this:", left)


def keep_in_fp32(model: nn.Module) -> None:
    """Raise the meta tensors that a family wants in fp32 whatever its dtype, such as a router's correction bias.

    from_pretrained does so too (the two `_keep_in_fp32_modules` lists; the plain one holds for fp16 only).
    """
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if getattr(model, "dtype", None) == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    wanted = re.compile(r"(^|\.)(" + "|".join(names) + r")($|\.)") if names else None
    for prefix, module in model.named_modules() if wanted else ():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if (
                    tensor is not None
                    and tensor.is_meta
                    and tensor.is_floating_point()
                    and wanted.search(f"{prefix}.{name}")
                ):
                    raised = tensor.detach().float()
                    table[name] = nn.Parameter(raised, tensor.requires_grad) if table is module._parameters else raised


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def drop_replaced_tensors(model: nn.Module) -> None:
    """Remove the meta tensors that operators adopted but loaded into attributes of their own instead."""
    for operator in model.modules():
        if not isinstance(operator, BaseInjectedModule) or type(operator).load is BaseInjectedModule.load:
            continue
        for table in (operator._parameters, operator._buffers):
            for name in [name for name, tensor in table.items() if tensor is not None and tensor.is_meta]:
                del table[name]


def tie(model: nn.Module, weights: WeightSource) -> None:
    """Give tied parameters (such as lm_head of a small model) their source, unless they live elsewhere.

    As in from_pretrained, two tensors in the checkpoint that differ are not tied, whatever the config says.
    """
    loaded = dict(model.named_parameters(remove_duplicate=False))
    tied_keys = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in list(tied_keys.items()):
        if not weights.same(target, origin):
            warn_once(f"the config ties {target} to {origin}, the checkpoint holds both and they differ: each is used")
            del tied_keys[target]
            continue
        module_name, _, name = target.rpartition(".")
        table, source = model.get_submodule(module_name)._parameters, loaded.get(origin)
        tied = table.get(name)
        if tied is not None and source is not None and (tied.is_meta or tied.device == source.device):
            table[name] = source


def _fill_buffers(model: nn.Module, devices: Mapping[str, str]) -> None:
    """Compute what no checkpoint holds (rotary frequencies and kin) with the family's own initialization."""
    waiting = False
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set:
                module._buffers[key] = torch.empty_like(buffer, device=device_of(name, devices))
                waiting = True
    if not waiting:
        return
    fresh = {id(b) for m in model.modules() for k, b in m._buffers.items() if k in m._non_persistent_buffers_set}
    for _, tensor in _named_tensors(model):
        tensor._is_hf_initialized = id(tensor) not in fresh
    for module in model.modules():  # some families write to loaded tensors without asking for the flag
        module._is_hf_initialized = all(id(buffer) not in fresh for buffer in module.buffers())
    with torch.no_grad():
        model.initialize_weights()


def _device_map(model: nn.Module, replacements: Mapping[str, Replacement]) -> dict[str, str]:
    """`hf_device_map` in accelerate's form. Trainers leave a model that has one where its rules put it."""
    layer = re.compile(r"^(.*\.\d+)\.")
    device_map: dict[str, str] = {}
    for name, replacement in replacements.items():
        whole = layer.match(name + ".")
        module = model.get_submodule(name) if replacement.operator is None else None
        owns = module is None or next(module.parameters(recurse=False), None) is not None
        if whole and whole.group(1) == name or owns and not whole:
            device_map[name] = str(replacement.device)
    return device_map


def _generation_config(config: Any) -> Any:
    """Stop tokens and sampling defaults from the config's folder, as from_pretrained reads them; None without any."""
    from transformers import GenerationConfig

    name = str(getattr(config, "_name_or_path", "") or "")
    path = Path(name) / "generation_config.json"
    if not name or not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(path.parent)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightError(f"{path}: cannot be read: {reason}. Correct it, or delete it to use the defaults.") from error


def _refuse_saving(model: nn.Module, source: Any, named: set[str]) -> None:
    """Make save_pretrained an error where operators hold tensors that the state dict had: the copy would lack them."""
    held = len(named - set(model.state_dict()))
    if not held:
        return

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"save_pretrained: operators compute {held} of {len(named)} tensors from the bytes of {source.path} and "
            "have no weights to save. Copy that checkpoint, or write another with `python -m ktransformers.quantize`. "
            "An adapter (PEFT) is saved by its own save_pretrained."
        )

    model.save_pretrained = save_pretrained
