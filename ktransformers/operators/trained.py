"""Weights that are trained themselves, not by adapters: which may be, and how they become dense.

What a checkpoint stores in floats may be trained: `requires_grad_(True)` of an operator makes its weights parameters,
under the family's names, and a copy of an operator, which PEFT makes of what it trains whole (`modules_to_save`), is
the family's module. Quantized weights are refused by name, for no step of an optimizer fits into them.
Letters: E experts.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError
from ktransformers.loaders import WeightSource
from ktransformers.models.traits import identity_experts
from ktransformers.operators.base_operator import BaseInjectedModule, load_own_weights


def untrainable(module: nn.Module) -> str:
    """Why the own weights of a module of the model cannot be trained, or ``""``."""
    if not isinstance(module, BaseInjectedModule) or any(p is not None for p in module._parameters.values()):
        return ""
    return _quantized(module.gguf_loader, module.key, ["weight", *module.orig_module._parameters])


def _quantized(weights: WeightSource, key: str, names: Sequence[str]) -> str:
    stored = [f"{key}.{name}" for name in names if weights.has(f"{key}.{name}")]
    kinds = dict.fromkeys(i.type.name for name in stored for i in weights.infos(name) if i.type.torch_dtype is None)
    if not kinds:
        return ""
    return (
        f"{key}: stored as {', '.join(kinds)}, and quantized weights are not trained. Train an adapter beside them "
        "(LoRA), or an unquantized checkpoint of the model"
    )


def dense(original: nn.Module, key: str, weights: WeightSource, device: Any) -> nn.Module:
    """A copy of the family's module, with its own weights from the checkpoint where it has none."""
    made = copy.deepcopy(original)
    lacking = [name for name, tensor in made._parameters.items() if tensor is not None and tensor.is_meta]
    if problem := _quantized(weights, key, lacking):
        raise UnsupportedError(f"{problem}.")
    if lacking:
        idle = identity_experts(made)
        if idle:  # of those that pass their input on nothing is stored
            made.gate_up_proj = nn.Parameter(made.gate_up_proj[:-idle])
        load_own_weights(made, weights, key, device)
        if idle:
            stored = made.gate_up_proj.data
            made.gate_up_proj = nn.Parameter(torch.cat((stored, stored.new_zeros(idle, *stored.shape[1:]))))
    return made


class Stacks:
    """Parameters of experts as the matrices of each: one gradient for a stack, not one as large for each expert."""

    def __init__(self, parameters: dict[str, Tensor | None], first: str, transposed: bool) -> None:
        turned: Callable[[Tensor], Tensor] = (lambda t: t.transpose(1, 2)) if transposed else (lambda t: t)
        self.gate_up, self.down = (turned(parameters[name]).unbind() for name in (first, "down_proj"))
        biases = parameters.get(f"{first}_bias"), parameters.get("down_proj_bias")
        self.gate_up_bias, self.down_bias = (None if bias is None else bias.unbind() for bias in biases)
