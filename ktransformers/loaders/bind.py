"""Between the checkpoint's names and the model's: `bind(files, model)` answers questions in module names.

Binding reads no tensor data.
"""

from collections import defaultdict

import torch
from torch import Tensor

from ktransformers.loaders.base import WeightFiles
from ktransformers.loaders.bind_gguf import bind_gguf
from ktransformers.loaders.bind_safetensors import bind_safetensors
from ktransformers.loaders.binding import Binding
from ktransformers.loaders.sources import (
    WHOLE_NUMBERS,
    Plain,
    WholeNumbers,
)
from ktransformers.loaders.weights import ModelWeights
from ktransformers.quants.scaled import ScaledType


def bind(files: WeightFiles, model: torch.nn.Module) -> ModelWeights:
    """Match a checkpoint to a transformers model (usually on the meta device), without reading tensor data.

    Raises UnsupportedError for a family or a conversion this version does not know and WeightError for a file
    of another family. What is missing, unused or misshapen is told by `ModelWeights.problems`.
    """
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    binding = Binding()
    binding.ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    (bind_gguf if files.format == "gguf" else bind_safetensors)(files, model, shapes, binding)
    _keep_whole_numbers(state, binding)
    _share_tied(model, binding)
    return ModelWeights(files, binding)


def _keep_whole_numbers(state: dict[str, Tensor], binding: Binding) -> None:
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


def _share_tied(model: torch.nn.Module, binding: Binding) -> None:
    """Deliver a tied tensor that the checkpoint leaves out from one it is tied to, in either direction.

    A checkpoint that holds both is read as it is: whether they are one is a question of their numbers.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups[origin].append(name)
    for origin, names in groups.items():
        members = [origin, *names]
        stored = next((binding.sources[name] for name in members if name in binding.sources), None)
        for name in members if stored else ():
            binding.sources.setdefault(name, stored)
            binding.absent.pop(name, None)
