"""Norms as operators: the family's own norm, where a rule puts it; on a GPU one launch, where it is recognized.

Rule files name one class per family; they are one and the same operator.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.models.traits import TRAITS
from ktransformers.native.checks import DTYPES
from ktransformers.operators import gpu_ops
from ktransformers.operators.base_operator import FamilyOperator
from ktransformers.operators.norms import Normed, normed_as
from ktransformers.operators.twin import noise, remembered, tensors_of, twin
from ktransformers.operators.watching import Numbers


class RMSNorm(FamilyOperator):
    """hidden [..., H] -> [..., H], as the family normalizes it (Qwen3-Next, for one, scales by 1 + weight)."""

    replaces = "a norm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._normed: Normed | None = None
        self._numbers: Numbers | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["norm"](module)

    def load(self) -> None:
        super().load()
        self._normed = None if gpu_ops.why_not(self) else norm_of(self)
        self._numbers = Numbers([self])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._normed is not None and not args and not kwargs and self._is_kernels(hidden_states):
            return gpu_ops.rms_norm(hidden_states, self.weight.detach(), self._normed.eps, self._normed.plus_one)
        return super().forward(hidden_states, *args, **kwargs)

    def _is_kernels(self, hidden: Tensor) -> bool:
        if type(hidden) is not Tensor or hidden.dtype not in DTYPES or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            return False
        same = hidden.dtype == self.weight.dtype and hidden.device == self.weight.device and hidden.stride(-1) == 1
        return same and self._numbers.unchanged()


@remembered
def norm_of(norm: nn.Module) -> Normed | None:
    """What a norm by the root mean square computes; None for anything else."""
    if tensors_of(norm).keys() != {"weight"}:
        return None
    made = twin(norm, torch.float32)
    x = noise(5, made.weight.shape[-1], seed=3)
    found = normed_as(made, x, made(x))
    return None if found is None or found.centered else found


class DeepseekV3RMSNormTorch(RMSNorm):
    """`RMSNorm`, under the name of DeepSeek-V3's rule files without kernels."""


class KQwen2MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen2-MoE's rule files."""


class KQwen3MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen3-MoE's rule files."""


class KQwen3NextRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of Qwen3-Next's rule files."""


class KGlm4MoeRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerRMSNorm(RMSNorm):
    """`RMSNorm`, under the name of SmallThinker's rule files."""
