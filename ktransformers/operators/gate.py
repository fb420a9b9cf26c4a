"""Routers as operators: the family's own choice of experts, on the CPU in one C call where it is recognized."""

from typing import Any

from torch import Tensor, nn

from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.operators.base_operator import FamilyOperator
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

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        routes = isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "top_k")
        return not is_linear(module) and (routes or TRAITS["router"](module))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
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


class KMoEGateQwen2Moe(KMoEGate):
    """`KMoEGate`, under the name of Qwen2-MoE's rule files."""
