"""A family's module on small random tensors: what those share who recognize a module by what its code computes.

The code of a family runs as it is, on made-up weights; nothing here knows routers, attention or layers. What was found
is kept for modules of the same code, settings and shapes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.operators.base_operator import PLAIN, BaseInjectedModule


def remembered(recognize: Callable[..., Any]) -> Callable[..., Any]:
    """`recognize(module, *more)` of the family's own module, asked once for each `signature`. An exception is None: the
    family's code may want anything, other arguments, other shapes, a device."""
    known: dict[tuple, Any] = {}

    @functools.wraps(recognize)
    def once(module: nn.Module, *more: Any) -> Any:
        module = original(module)
        key = (signature(module), *more)
        if key not in known:
            try:
                with torch.no_grad():
                    known[key] = recognize(module, *more)
            except Exception:
                known[key] = None
        return known[key]

    return once


def original(module: nn.Module) -> nn.Module:
    """The family's module that an operator took the place of, or `module` itself."""
    return module.orig_module if isinstance(module, BaseInjectedModule) else module


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Dotted name -> tensor of the family's module and those below it, operators or not."""
    module, found = original(module), {}
    for table in (module._parameters, module._buffers):
        found |= {name: tensor for name, tensor in table.items() if tensor is not None}
    for name, child in module._modules.items():
        if child is not None:
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(child).items()}
    return found


def twin(
    module: nn.Module, dtype: torch.dtype | None = None, stubs: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """A module of the same code and settings with small random tensors, of `dtype` or those of the module's own.

    `stubs` take the place of children. Hooks stay behind.
    """
    module = original(module)
    made = object.__new__(type(module))
    made.__dict__.update({name: type(v)() if "_hooks" in name and v else v for name, v in vars(module).items()})
    for table in ("_parameters", "_buffers"):
        made.__dict__[table] = {name: _random(tensor, dtype) for name, tensor in getattr(module, table).items()}
    children = {name: child if child is None else twin(child, dtype) for name, child in module._modules.items()
                if name not in (stubs or {})}  # fmt: skip
    made.__dict__["_modules"] = children | dict(stubs or {})
    made.__dict__["training"] = False
    return made


def _random(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if tensor is None:
        return None
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    values = torch.randn(tensor.shape, generator=generator(tensor.numel()), dtype=torch.float32, device="cpu")
    values = values * 2 / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 and tensor.shape[0] > 1 else values * 0.3 + 0.2
    return values.to(tensor.dtype if dtype is None else dtype)


class Listener(nn.Module):
    """In the place of a module: remembers what it was given and what it gave."""

    def __init__(self, inner: Callable[..., Any], like: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["like"] = inner, original(like)
        self.heard: list[tuple[tuple, dict, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gave = self.inner(*args, **kwargs)
        self.heard.append((args, kwargs, gave))
        return gave

    def __getattr__(self, name: str) -> Any:
        """Families ask layers for their kind."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["like"], name)

    @property
    def once(self) -> tuple[tuple, dict, Any]:
        """Of its only call. Raises ValueError where there were others, or none."""
        (heard,) = self.heard
        return heard


def noise(*shape: int, seed: int) -> Tensor:
    """Random numbers in float32 on the CPU, whatever the caller's defaults are."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float32, device="cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signature(module: nn.Module) -> tuple:
    """What the results of a module's code depend on, apart from the values of its tensors."""
    settings = [(k, repr(v)) for k, v in vars(module).items() if isinstance(v, PLAIN) and k != "layer_idx"]
    settings += [(k, v.to_json_string()) for k, v in vars(module).items() if hasattr(v, "to_json_string")]
    settings += _of_this_layer(module)
    shapes = [(n, tuple(t.shape), t.dtype) for n, t in tensors_of(module).items()]
    below = [(n, signature(original(c))) for n, c in module._modules.items() if c is not None]
    return (type(module), *sorted(settings), *shapes, *below)


def _of_this_layer(module: nn.Module) -> list[tuple[str, str]]:
    """What lists of the config, one entry a layer, say of the module's own."""
    layer, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(layer, int) or not isinstance(count, int) or not 0 <= layer < count:
        return []
    return [(n, repr(v[layer])) for n, v in vars(config).items() if isinstance(v, list) and len(v) == count]


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=atol)
