"""Norms of hidden states: by their root mean square, or centered, recognized by what they give."""

from dataclasses import dataclass

from torch import Tensor, nn

from ktransformers import native
from ktransformers.operators.attending import epsilon, normed
from ktransformers.operators.twin import close


@dataclass(frozen=True)
class Normed:
    """x by its root mean square, times weight; `centered`: of x - mean(x); `plus_one`: the weight is that of the module
    and one."""

    eps: float
    plus_one: bool = False
    centered: bool = False

    def apply(self, norm: nn.Module, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        return normed(x, self._weight(norm), self.eps)

    def native(self, norm: nn.Module) -> native.Norm:
        """That of a module loaded."""
        return native.Norm(self._weight(norm), self.eps, self.centered)

    def _weight(self, norm: nn.Module) -> Tensor:
        return norm.weight.detach().float() + (1.0 if self.plus_one else 0.0)


def normed_as(norm: nn.Module, x: Tensor, gave: Tensor) -> Normed | None:
    """What `norm`, of no tensor but a weight, computes, by what it gave for x; None for anything else."""
    if getattr(norm, "bias", None) is not None:
        return None
    tried = (Normed(epsilon(norm), plus_one, centered) for centered in (False, True) for plus_one in (False, True))
    return next((each for each in tried if close(each.apply(norm, x), gave)), None)
