"""Routers as operators: the family's own choice of experts, recognized: in one C call, or by a GPU's kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.native.checks import DTYPES
from ktransformers.operators import gpu_ops
from ktransformers.operators.base_operator import FamilyOperator
from ktransformers.operators.gpu_router import GpuRouter, gpu_router
from ktransformers.operators.routing import RouterInC, may_use_c


class KMoEGate(FamilyOperator):
    """The family's router: hidden [..., H] -> (logits [T, E], weights [T, K], ids [T, K]).

    It stays an instance of the router's class, so ``output_router_logits=True`` and what trains with it work. Routers
    that routing.py recognizes are computed in C on the CPU; others, and all with gradients, by the family's code.
    Equal scores go by ascending id in C; torch promises no order.
    """

    replaces = "a router (weight [E, H] and top_k)"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.in_c = RouterInC()
        self._on_gpu = False
        self._gpu: dict[torch.dtype, GpuRouter | None] = {}

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        routes = isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "top_k")
        return not is_linear(module) and (routes or TRAITS["router"](module))

    def load(self) -> None:
        super().load()
        self._on_gpu = not gpu_ops.why_not(self)

    def _by_kernels(self, hidden: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """What the family returns, where kernels compute it."""
        if type(hidden) is not Tensor or hidden.dtype not in DTYPES or torch.compiler.is_compiling() or self.training:
            return None
        if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in self.parameters())):
            return None
        if hidden.dtype not in self._gpu:
            self._gpu[hidden.dtype] = gpu_router(self, hidden.dtype)
        found = self._gpu[hidden.dtype]
        return None if found is None else found.forward(self, hidden, given)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._on_gpu and not kwargs and len(args) < 2:
            out = self._by_kernels(hidden_states, *args)
            if out is not None:
                return out
        if not kwargs and len(args) < 2 and may_use_c(self, hidden_states):
            found = self.in_c.of(self, hidden_states.dtype, *args)
            if found is not None and (hidden_states.dim() == 2 or found[0].flattens):
                return found[0].returned(*found[1].forward(hidden_states.reshape(-1, hidden_states.shape[-1])))
        return super().forward(hidden_states, *args, **kwargs)

    @property
    def is_in_c(self) -> bool:
        """Whether its last calls were calls to C."""
        return self.in_c.is_made

    def extra_repr(self) -> str:
        return "in C" if self.is_in_c else ""

    def unload(self) -> None:
        super().unload()
        self.in_c.forget()
        self._gpu.clear()


class KMoEGateQwen2Moe(KMoEGate):
    """`KMoEGate`, under the name of Qwen2-MoE's rule files."""
