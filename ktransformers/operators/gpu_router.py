"""A family's router on a GPU: its product, and one launch for scores, choice and weights. What it computes is
recognized as it is for C (routing.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers.native import torch_ops
from ktransformers.operators import gpu_ops
from ktransformers.operators.routing import ARGUMENT, Recognized, recognized
from ktransformers.operators.watching import Numbers


class GpuRouter:
    """Of one router and type of hidden states."""

    def __init__(self, router: nn.Module, found: Recognized) -> None:
        self.found, self.choice = found, found.choice
        self.number = torch_ops.name_it(self)
        self._numbers = Numbers([router, *router._modules.values()])

    def forward(self, router: nn.Module, hidden: Tensor, given: Tensor | None) -> tuple[Tensor, ...] | None:
        """hidden [.., H] -> what the family returns, by the tensors that the router has now; None where they are
        elsewhere, or numbers have changed."""
        roles = self.found.roles.items()
        parts = {role: given if name == ARGUMENT else _tensor(router, name) for role, name in roles}
        there = all(part is not None and part.device == hidden.device for part in parts.values())
        if not there or not self._numbers.unchanged() or hidden.dim() != 2 and not self.found.flattens:
            return None
        dtype, vectors = hidden.dtype if self.choice.round else torch.float32, parts | {"weight": None}
        bias, choice_bias, factors = (
            None if vectors.get(role) is None else vectors[role].detach().flatten()
            for role in ("bias", "choice_bias", "factors")
        )
        rows, weight = hidden.reshape(-1, hidden.shape[-1]).to(dtype), parts["weight"].detach().to(dtype)
        logits = F.linear(rows, weight, None if bias is None else bias.to(dtype))
        ids, weights = gpu_ops.choose(logits, choice_bias, factors, self.number)
        if self.choice.cap:
            logits = self.choice.cap * torch.tanh(logits.float() / self.choice.cap)
        return self.found.returned(ids, weights, logits)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """That of a dotted name; None where something else than a family's module holds it."""
    *path, last = name.split(".")
    for step in path:
        module = module._modules[step]
    return module._parameters.get(last, module._buffers.get(last))


def gpu_router(router: nn.Module, dtype: torch.dtype) -> GpuRouter | None:
    """What computes `router` on its GPU; None where it is not recognized, or norms its input."""
    found = recognized(router, dtype)
    return None if found is None or "norm" in found.roles else GpuRouter(router, found)
