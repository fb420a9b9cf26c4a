"""Where adapters go: LoraConfig from a training file's `lora_target`."""

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ktransformers.errors import SFTError, did_you_mean
from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.trained import untrainable
from ktransformers.operators.twin import original
from ktransformers.sft.options import Options

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def lora_config(model: nn.Module, options: Options) -> "LoraConfig":
    """The adapter that a training file asks for. Raises SFTError for a target that is not in the model."""
    from peft import LoraConfig

    names = [name.strip() for name in options.lora_target.split(",") if name.strip()]
    whole = [name.strip() for name in options.additional_target.split(",") if name.strip()]
    if options.kt_full_weight_grad:
        whole += dict.fromkeys(parameter.rpartition(".")[0] for parameter in _expert_parameters(model))
    _check(model, [name for name in names if name != "all"], whole)
    linears = _linears(model)
    experts = [] if options.kt_full_weight_grad else _expert_parameters(model)
    called = [n for n in names if any(_is_called(full, n) for full in linears)]
    parameters = [p for n in names for p in _parameters_named(n, experts)]
    if "all" in names:
        called, parameters = _last_words(linears), experts
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.alpha, lora_dropout=options.lora_dropout, target_modules=called,
        use_rslora=options.use_rslora, modules_to_save=whole or None, task_type="CAUSAL_LM",
    )  # fmt: skip
    taken = {name: _taken_for(config, model, name) for name in called}
    config.target_modules = [name for name, what in taken.items() if not what]
    parameters += [f"{name}.weight" for name, what in taken.items() if what == "experts"]
    parameters += [weight for name in names for weight in _weights_of_routers(model, name)]
    config.target_parameters = list(dict.fromkeys(parameters)) or None
    return config


def without_adapter(model: "PeftModel") -> list[str]:
    """Linear layers that got none, by the last part of their names; head and routers, which get none, are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    names = _linears(model.get_base_model())
    bare = [n for n in names if not any(f"base_model.model.{n}.".startswith(f"{i}.") for i in inside)]
    return sorted({".".join(name.split(".")[-2:]) for name in bare})


def _linears(model: nn.Module) -> list[str]:
    """Linear layers that an adapter fits: no head, whose loss reads its weight, no router, and none that computes in a
    way of its own, of which PEFT would make a plain one."""
    head = model.get_output_embeddings()
    routers = [name for name, m in model.named_modules() if TRAITS["router"](original(m))]
    return [name for name, m in model.named_modules() if is_linear(original(m)) and m is not head
            and not any(name == r or name.startswith(f"{r}.") for r in routers)]  # fmt: skip


def _last_words(names: list[str]) -> list[str]:
    return sorted({full.rpartition(".")[2] for full in names})


def _weights_of_routers(model: nn.Module, name: str) -> list[str]:
    """What PEFT calls the weights of routers, where `name` names one: "router", or a module as any other."""
    found = {}
    for full, module in model.named_modules():
        if TRAITS["router"](original(module)) and (name == "router" or _is_called(full, name)):
            for own, weight in module.named_parameters():
                if weight.dim() == 2 and own.endswith("weight"):
                    found[".".join([*full.split(".")[-2:], own])] = None
    return list(found)


def _expert_parameters(model: nn.Module) -> list[str]:
    """What PEFT calls the weights of experts, without the number of the layer: "mlp.experts.gate_up_proj"."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, KTransformersExperts) or TRAITS["experts"](module):
            for parameter, _ in module.named_parameters(recurse=False):
                if not parameter.endswith("bias"):
                    found[".".join([*name.split(".")[-2:], parameter])] = None
    return list(found)


def _taken_for(config: "LoraConfig", model: nn.Module, name: str) -> str:
    """What PEFT takes a linear layer's name for: "experts" in families of its table, which call those gate_proj and
    so on; "none" where it refuses it (out_proj of Mamba); "" for what it is."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    trial, name = copy.deepcopy(config), name.rpartition(".")[2]
    trial.target_modules, trial.target_parameters = {name}, set()
    try:
        _check_lora_target_modules_mamba(trial, model, name)
    except ValueError:
        return "none"
    try:
        convert_peft_config_for_transformers(trial, model=model, conversions=None)
    except ValueError:  # half of what is one for it, gate without up
        return "experts"
    return "" if name in trial.target_modules else "experts"


_EXPERTS = {"experts": "", "gate_up_proj": "gate_up_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
            "down_proj": "down_proj"}  # fmt: skip


def _parameters_named(name: str, experts: list[str]) -> list[str]:
    """The parameters of experts that a target names, by PEFT's name or by that of a single expert's matrix."""
    end = _EXPERTS.get(name, name)
    return [p for p in experts if name == "experts" or p.endswith(f".{end}")]


def _is_called(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _check(model: nn.Module, targets: list[str], whole: list[str]) -> None:
    experts, linears = _expert_parameters(model), _linears(model)
    for name in targets:
        reached = any(_is_called(full, name) for full in linears) or _parameters_named(name, experts)
        if not reached and not _weights_of_routers(model, name):
            known = [*_last_words(linears), *(("experts", "gate_up_proj", "down_proj", "router") if experts else ())]
            near = did_you_mean(name, known)
            raise SFTError(f"lora_target: the model has no {name!r}{near}; it has all, {', '.join(known)}.")
    for name in whole:
        found = [m for full, m in model.named_modules() if full == name or full.endswith(f".{name}")]
        if not found:
            raise SFTError(f"additional_target: the model has no module {name!r}.")
        if problems := [problem for m in found if (problem := untrainable(m))]:
            raise SFTError(f"additional_target: {problems[0]}.")


def forget_dropout(model: Any) -> None:
    """Of adapters on parameters, before they are saved: PEFT loads none whose file has dropout, which is training's."""
    for config in getattr(model, "peft_config", {}).values():
        if config.target_parameters:
            config.lora_dropout = 0.0


def note_of(left: list[str]) -> str:
    """Which layers have no adapter and why, or ``""``."""
    if not left:
        return ""
    return (
        f"lora_target all: no adapter on {', '.join(left)}; PEFT refuses them in this family, and an adapter of ours "
        "is to load in PEFT"
    )


def count(model: Any) -> tuple[int, int]:
    """(values that are trained, of these inside experts)."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(n for _, n in trained), sum(n for name, n in trained if ".experts." in name)
