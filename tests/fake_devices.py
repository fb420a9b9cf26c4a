"""Devices this machine does not have: fake tensors on ``cuda:0``, ``cuda:1``, ... that refuse to mix."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


class _WithoutGuards(TorchFunctionMode):
    """A few tensor methods first switch to the tensor's device, which a build without CUDA cannot do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _BEHIND.get(function, function)(*args, **(kwargs or {}))


def _index(x: torch.Tensor, index) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, torch.Tensor) for part in parts):
        return torch.ops.aten.index(x, [part if isinstance(part, torch.Tensor) else None for part in parts])
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        named = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim = 0
    for part in parts:
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, int):
            x = x.select(dim, part)
            continue
        elif part != slice(None):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return x


_BEHIND = {
    torch.Tensor.__getitem__: _index,
    torch.Tensor.contiguous: torch.ops.aten.contiguous,
    torch.Tensor.copy_: torch.ops.aten.copy_,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not,
}


@contextlib.contextmanager
def fake_devices():
    """Inside, ``torch.empty(2, device="cuda:7")`` works: shapes, dtypes and devices, but no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), _WithoutGuards(), torch.no_grad():
        yield
