"""Routers as operators. The choice of experts stays the family's own code; only placement is ours."""

from torch import Tensor, nn

from ktransformers.operators.base_operator import FamilyOperator


class KMoEGate(FamilyOperator):
    """The family's router: hidden [..., H] -> (logits [T, E], weights [T, K], ids [T, K]).

    It stays an instance of the router's class, so ``output_router_logits=True`` and what trains with it work.
    """

    replaces = "a router (weight [E, H] and top_k)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        routes = isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "top_k")
        return routes and not isinstance(module, nn.Linear)


class KMoEGateQwen2Moe(KMoEGate):
    """`KMoEGate`, under the name of Qwen2-MoE's rule files."""
