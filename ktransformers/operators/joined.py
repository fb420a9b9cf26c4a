"""Dense linear layers of one input as one product on a GPU: one launch, not three, where each takes a microsecond.

Their weights become parts of one matrix, so each layer still computes alone (a prompt, an adapter), on the same memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers.operators.combining import has_hooks
from ktransformers.operators.linear import KLinearTorch, KTransformersLinear


class Joined:
    """x [.., K] -> of each linear layer [.., N]: views of one result, where they could be joined and are as then."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = list(linears)
        self._weight = self._bias = None
        self._parts = [_dense(linear) for linear in self.linears]
        if None in self._parts or len({(w.dtype, w.device, w.shape[1]) for w, _ in self._parts}) != 1:
            return
        self._sizes = [len(weight) for weight, _ in self._parts]
        self._weight = _one([weight for weight, _ in self._parts])
        if any(bias is not None for _, bias in self._parts):
            self._bias = _one([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in self._parts])

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self._weight is None or x.dtype != self._weight.dtype or not self._unchanged():
            return [linear(x) for linear in self.linears]
        return F.linear(x, self._weight, self._bias).split(self._sizes, -1)

    def _unchanged(self) -> bool:
        for linear, (weight, bias) in zip(self.linears, self._parts, strict=True):
            found = _dense(linear)
            if found is None or found[0] is not weight or found[1] is not bias:
                return False
        return True


def _one(tensors: list[Tensor]) -> Tensor:
    """A tensor of all of them, whose memory is theirs from now on."""
    made = torch.cat([tensor.detach() for tensor in tensors])
    start = 0
    for tensor in tensors:
        tensor.data = made[start : start + len(tensor)]
        start += len(tensor)
    return made


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The dense weight [N, K] of a linear layer without a bias that nobody looks at; None for any other."""
    found = _dense(linear)
    return None if found is None or found[1] is not None else found[0].detach()


def _dense(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [N, K] and bias of a module that multiplies by them, and nobody looks at; else None."""
    inner = linear.active if isinstance(linear, KTransformersLinear) else linear
    plain = type(inner) is KLinearTorch and linear.out_device is None or type(linear) is nn.Linear
    weight = getattr(inner, "weight", None) if plain and not has_hooks(linear) else None
    return None if weight is None or type(weight.data) is not Tensor else (weight, inner.bias)
