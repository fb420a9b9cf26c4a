"""What a model needs beyond its operators and tensors, so that it is what `from_pretrained` would have returned.

`optimize.py` calls each of these once, in the order of its story; none of them knows rules or opens a checkpoint.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.loaders import WeightSource
from ktransformers.operators.base_operator import BaseInjectedModule, device_of, to_device, warn_once
from ktransformers.rules.plan import Replacement


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


def fill_buffers(model: nn.Module, devices: Mapping[str, str]) -> None:
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
    for _, tensor in named_tensors(model):
        tensor._is_hf_initialized = id(tensor) not in fresh
    for module in model.modules():  # some families write to loaded tensors without asking for the flag
        module._is_hf_initialized = all(id(buffer) not in fresh for buffer in module.buffers())
    with torch.no_grad():
        model.initialize_weights()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def device_map(model: nn.Module, replacements: Mapping[str, Replacement]) -> dict[str, str]:
    """`hf_device_map` in accelerate's form. Trainers leave a model that has one where its rules put it."""
    layer = re.compile(r"^(.*\.\d+)\.")
    places: dict[str, str] = {}
    for name, replacement in replacements.items():
        whole = layer.match(name + ".")
        module = model.get_submodule(name) if replacement.operator is None else None
        owns = module is None or next(module.parameters(recurse=False), None) is not None
        if whole and whole.group(1) == name or owns and not whole:
            places[name] = str(replacement.device)
    return places


def outputs_to_inputs(model: nn.Module, places: Mapping[str, str]) -> None:
    """Have a model on several devices return what it computes with gradients where its inputs were, as accelerate's
    do: trainers compare losses and labels with those. Without gradients logits stay where the head is."""
    if len(set(places.values())) < 2:
        return

    def move(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is None or not torch.is_grad_enabled() or not hasattr(out, "to_tuple"):
            return
        for name, value in out.items():
            out[name] = to_device(value, given.device)

    move.only_moves = True
    model.register_forward_hook(move, with_kwargs=True)


def generation_config(config: Any) -> Any:
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


def let_save(model: nn.Module, source: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Have save_pretrained write what the state dict lacks, since operators compute from the checkpoint, from there.

    `dtypes`: of the tensors that the model had before. Quantized ones have no form that could be written: an error.
    """
    if not dtypes.keys() - model.state_dict().keys():
        return

    def save_pretrained(save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        state = dict(model.state_dict() if state_dict is None else state_dict)
        lacking = [name for name in dtypes if name not in state and source.has(name)]
        if packed := [n for n in lacking if any(info.type.torch_dtype is None for info in source.infos(n))]:
            found = f"operators compute {len(packed)} of {len(dtypes)} tensors from the quantized bytes of "
            found += str(source.path)
            raise UnsupportedError(
                f"save_pretrained: {found} and have no weights to save. Copy that checkpoint, or write another with "
                "`kt quantize`. An adapter (PEFT) is saved by its own save_pretrained."
            )
        state |= {name: source.tensor(name, device="cpu", dtype=dtypes[name]) for name in lacking}
        type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)

    model.save_pretrained = save_pretrained
