"""The float type of a checkpoint: what its numbers are held in where neither config nor caller says.

A config without `dtype` leaves a model built by `from_config` in float32, twice the bytes of most checkpoints;
`from_pretrained` looks at the weights (`dtype="auto"`), and so does this.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from ktransformers.loaders.base import WeightFiles


def checkpoint_dtype(files: WeightFiles) -> torch.dtype:
    """The float type of an open checkpoint.

    Of safetensors it is that of the first plain float tensor of the first file, in the order of their names, as
    transformers chooses; scales of quantized weights do not count. GGUF keeps vectors in F32 whatever the model was
    made in: it is float32 where every matrix is F32, else bfloat16, which holds the range of any of its types.
    """
    infos = [files.info(name) for name in files.names()]
    if files.format == "gguf":
        matrices = (info for info in infos if len(info.shape) > 1)
        return torch.float32 if all(info.type.name == "F32" for info in matrices) else torch.bfloat16
    order = {path: number for number, path in enumerate(files.paths)}
    floats = [info for info in infos if info.type.torch_dtype is not None]
    first = min(floats, key=lambda info: (order[info.file], info.name), default=None)
    return first.type.torch_dtype if first else torch.float32


@contextlib.contextmanager
def held_as_stored(model: nn.Module, files: WeightFiles) -> Iterator[None]:
    """Give a meta model that is float32 only by default the dtype of `files`, for good unless the block raises.

    A dtype in the config, in `from_config(config, dtype=...)`, in `model.to(...)` or in `torch.set_default_dtype` is
    the caller's choice and stays.
    """
    config = model.config
    if getattr(config, "dtype", None) is not None or not _float32_by_default(model):
        yield
        return
    dtype = checkpoint_dtype(files)
    parts = [config, *(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None)]
    before = [(part, part.dtype) for part in parts]
    with torch.device("meta"):  # tensors that a family always has in float32 stay so
        wanted = type(model)._from_config(copy.deepcopy(config), dtype=dtype)
    _take_dtypes(model, wanted)
    for part in parts:
        part.dtype = dtype
    try:
        yield
    except BaseException:  # whoever restores tensors does so around this block
        for part, was in before:
            part.dtype = was
        raise


def _float32_by_default(model: nn.Module) -> bool:
    if torch.get_default_dtype() != torch.float32 or not hasattr(type(model), "_from_config"):
        return False
    return {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} == {torch.float32}


def _take_dtypes(model: nn.Module, wanted: nn.Module) -> None:
    """Give each meta tensor of `model` the dtype of the tensor of its name in `wanted`."""
    dtypes = {name: t.dtype for name, t in (*wanted.named_parameters(), *wanted.named_buffers())}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                dtype = dtypes.get(f"{prefix}.{name}" if prefix else name)
                if old is None or not old.is_meta or dtype in (None, old.dtype):
                    continue
                new = old.detach().to(dtype)
                table[name] = nn.Parameter(new, old.requires_grad) if table is module._parameters else new
