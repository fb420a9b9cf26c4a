"""Devices this machine does not have: fake tensors on ``cuda:0``, ``cuda:1``, ... that refuse to mix.

A fake tensor has a shape, a dtype and a device, and no numbers. torch computes all three for every operation and raises
where real devices would. What is added here: methods that want to switch to the device first, and operations whose
result depends on numbers. Not here: operators, weights, what is measured.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class _WithoutGuards(TorchFunctionMode):
    """A few tensor methods first switch to the tensor's device, or ask which one is in use: a build without CUDA can
    do neither."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            args = (args[0], *map(_numbered, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        return _REPLACED.get(function, function)(*args, **kwargs)


def _numbered(value: Any) -> Any:
    """``cuda`` as ``cuda:0``; anything else as it is."""
    if isinstance(value, (str, torch.device)) and str(value) == "cuda":
        return torch.device("cuda:0")
    return value


def _index(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]``, made of operations that need no guard."""
    if not _can_resolve(x, index):
        return torch.Tensor.__getitem__(x, index)
    view, picks = _resolve(x, index)
    return aten.index(view, picks) if any(pick is not None for pick in picks) else view


def _set_index(x: torch.Tensor, index: Any, value: Any) -> None:
    """``x[index] = value``."""
    if not _can_resolve(x, index):
        torch.Tensor.__setitem__(x, index, value)
        return
    view, picks = _resolve(x, index)
    value = value.to(x.dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=x.dtype)
    if any(pick is not None for pick in picks):
        aten.index_put_(view, picks, value)
    else:
        aten.copy_(view, value)


def _can_resolve(x: torch.Tensor, index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    known = (type(None), type(Ellipsis), int, slice)
    return isinstance(x, FakeTensor) and all(type(part) in known or isinstance(part, torch.Tensor) for part in parts)


def _resolve(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view of `x` that slices, numbers and None make, and what picks in each of its dimensions, or None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(_dims(part) for part in parts)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim, picks = 0, []
    for part in parts:
        if isinstance(part, torch.Tensor):
            picks += _picks_all(part) if _is_mask(part) else [part]
            dim += _dims(part)
            continue
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif part != slice(None):
            x = aten.slice(x, dim, part.start, part.stop, part.step or 1)
        picks.append(None)
        dim += 1
    return x, picks


def _dims(part: Any) -> int:
    """How many dimensions a part of an index takes; a mask takes all that it has."""
    if _is_mask(part):
        return part.dim()
    return 0 if part is None or part is Ellipsis else 1


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)


def _picks_all(mask: torch.Tensor) -> list[torch.Tensor]:
    """A mask as numbers, one tensor for each of its dimensions: all of it is taken to be true."""
    return [torch.empty(mask.numel(), dtype=torch.int64, device=mask.device) for _ in range(mask.dim())]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's fused attention, which holds no scores in memory. Where a device has none, or nothing fits, products."""
    if not isinstance(query, FakeTensor):
        given = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **given)
    fits = query.shape[-1] == key.shape[-1] and key.shape[:-1] == value.shape[:-1] and query.device == key.device
    alike = query.shape[: 1 if enable_gqa else -2] == key.shape[: 1 if enable_gqa else -2]
    fused = query.device.type != "cpu" or query.shape[-1] == value.shape[-1]
    masked = attn_mask is None or attn_mask.device == query.device and attn_mask.shape[-1] in (1, key.shape[-2])
    if fits and alike and fused and masked and key.device == value.device:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            return _trained_attention(query, key, value, attn_mask, is_causal, scale)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1).to(value.dtype) @ value


def _trained_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """The same with what its backward reads: the operands, the result and a sum for each query."""
    key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if query.device.type == "cpu":
        return functional.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, 0.0, causal, scale=scale)[0]


_REPLACED = {
    functional.scaled_dot_product_attention: _attention,
    torch.Tensor.__getitem__: _index,
    torch.Tensor.__setitem__: _set_index,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.copy_: aten.copy_,
    torch.Tensor.cuda: lambda x, device="cuda:0": x.to(_numbered(device)),
    torch.Tensor.__int__: lambda x: int(x.item()),
    torch.Tensor.__index__: lambda x: int(x.item()),
    torch.Tensor.__float__: lambda x: float(x.item()),
    torch.Tensor.__invert__: aten.bitwise_not,
    torch.Tensor.nonzero: lambda x, as_tuple=False: aten.nonzero_numpy(x) if as_tuple else aten.nonzero(x),
    torch.nonzero: lambda x, as_tuple=False: aten.nonzero_numpy(x) if as_tuple else aten.nonzero(x),
}


def _scalar(x: torch.Tensor) -> bool | int | float:
    return False if x.dtype == torch.bool else 0.0 if x.is_floating_point() else 0


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((x.numel(), x.dim()), dtype=torch.int64, device=x.device)


def _bincount(x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    return torch.empty(minlength, dtype=torch.int64 if weights is None else weights.dtype, device=x.device)


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *more: Any) -> torch.Tensor:
    given = [t for t in (x, weight, bias) if t is not None]
    if len({t.device for t in given}) > 1:
        found = ", ".join(str(t.device) for t in given)
        raise RuntimeError(f"aten.convolution.default: found tensors on {found}, expected one device")
    with fake_tensor.unset_fake_temporarily():
        shapes = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (x, weight, bias)]
        out = aten.convolution(*shapes, *more)
    return torch.empty(out.shape, dtype=out.dtype, device=x.device)


_ANSWERS = {
    aten.convolution.default: _convolution,
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten.bincount.default: _bincount,
}


class FakeDevices(FakeTensorMode):
    """torch's `FakeTensorMode`, without asking a GPU that may be there: ``cuda:7`` works with one real GPU too.

    It answers what only numbers could: a scalar is 0, and every element is nonzero. And convolutions, for which torch
    asks the device's libraries.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    @property
    def avoid_device_init(self) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None and isinstance(args[0], FakeTensor) and args[0].constant is None:
            with self:
                return answer(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, ``owner.name`` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def fake_devices() -> Iterator[None]:
    """Inside, ``torch.empty(2, device="cuda:7")`` works: shapes, dtypes and devices, but no numbers and no memory."""
    with (
        swapped(logging.getLogger(fake_tensor.__name__), "disabled", True),  # it prints what it raises too
        swapped(fake_tensor, "init_gpu_context", lambda device: None),
        swapped(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        FakeDevices(),
        _WithoutGuards(),
        torch.no_grad(),
    ):
        yield
