"""Upstream's path of what operators and programs share: loading of children, replacing of modules, the device."""

from typing import Any

import torch
from torch import nn

from ktransformers.operators import base_operator
from ktransformers.operators.base_operator import InferenceState
from ktransformers.upstream import gone, older_path

__all__ = ["InferenceState", "get_compute_capability", "load_weights", "set_module"]
_GENERATE = "use model.generate(input_ids, ...), or `kt chat`"
__getattr__ = gone(
    __name__,
    {
        "prefill_and_generate": _GENERATE,
        "load_kv_and_generate": _GENERATE,
        "load_cur_state_dict": "use ktransformers.operators.base_operator.load_own_weights",
        "get_device": "model.hf_device_map says where layers are, and operator.device where an operator is",
        "get_all_used_cuda_device": "use set(model.hf_device_map.values())",
    },
)


def load_weights(module: nn.Module, gguf_loader: Any, prefix: str = "", device: Any = None) -> None:
    """Load `module` and all below it; `prefix` is its name and a dot. `device` None: where the rules put it."""
    name = prefix.removesuffix(".")
    devices = getattr(gguf_loader, "devices", {}) if device is None else {name: str(device)}
    base_operator.load_weights(module, gguf_loader, name, devices)


def set_module(model: nn.Module, submodule_key: str, module: nn.Module) -> None:
    """Put `module` in the place of the one that `model` has at the dotted name `submodule_key`."""
    model.set_submodule(submodule_key, module)


def get_compute_capability(device: Any = None) -> float:
    """CUDA's compute capability as in 8.6: of `device`, or the lowest of all GPUs; 0 without any."""
    devices = range(torch.cuda.device_count()) if device is None else [device]
    return min((major + minor / 10 for major, minor in map(torch.cuda.get_device_capability, devices)), default=0.0)


older_path(__name__, "ktransformers.operators.base_operator")
