"""What stands where a dense weight would be: shape, dtype and device, and numbers only where someone takes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ktransformers.errors import UnsupportedError
from ktransformers.native import dequantize


class PackedWeight:
    """A weight that exists packed alone, as families and libraries (PEFT) ask for it before they compute with a module.

    Whatever would read or write numbers is an error that says how to have a dense weight `instead`. An AttributeError,
    so that hasattr() and getattr(..., None) answer as for any object without it; where torch is called with it, an
    UnsupportedError.
    """

    requires_grad = False
    is_meta = False

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: Any, instead: str) -> None:
        self.name, self.shape, self.dtype = name, torch.Size(shape), dtype
        self.device, self.ndim, self._instead = torch.device(device), len(shape), instead

    @property
    def why(self) -> str:
        return f"{self.name}: computes from packed bytes and has no dense weight"

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.why}, so it has no {name!r}; {self._instead}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        raise UnsupportedError(f"{found.why}, which {getattr(func, '__name__', func)} wants; {found._instead}")

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(f"{self.why} to copy or pickle; {self._instead}")


class ReadWeight(Tensor):
    """The weight of a packed linear layer to libraries that multiply with it themselves, as TRL's losses do with
    lm_head: whatever takes it gets the rows that it takes in dense form, made for that one operation. It is never
    written to, and its module computes without it."""

    @staticmethod
    def __new__(cls, name: str, packed: Any, dtype: torch.dtype, instead: str) -> "ReadWeight":
        made = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=dtype, device="cpu")
        made.of, made.packed, made.instead = name, packed, instead
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                found = f"{value.of}: computes from packed bytes, which cannot be changed"
                raise UnsupportedError(f"{found}; {value.instead}")
        first = args[0] if args else None
        if func is torch.ops.aten.detach.default:
            return cls(first.of, first.packed, first.dtype, first.instead)
        if func is torch.ops.aten.slice.Tensor and isinstance(first, cls) and hasattr(first.packed, "rows"):
            _, dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
            start, stop, step = slice(start, stop, step).indices(first.shape[0]) if dim == 0 else (0, 0, 0)
            if step == 1 and start < stop:
                return cls(first.of, first.packed.rows(start, stop), first.dtype, first.instead)
        dense = tree_map_only(cls, numbers_of, (args, kwargs))
        return func(*dense[0], **dense[1])

    def __repr__(self, **kwargs: Any) -> str:
        return f"ReadWeight({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> "ReadWeight":
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(f"{self.of}: computes from packed bytes, which are not pickled; {self.instead}")


def numbers_of(weight: ReadWeight) -> Tensor:
    """A dense copy, made by way of fp32."""
    return dequantize(weight.packed).to(weight.dtype)
