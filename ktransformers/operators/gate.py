"""Routers as operators. The choice of experts stays the family's own code; only placement is ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ktransformers.operators.base_operator import FamilyOperator


class KMoEGate(FamilyOperator):
    """The family's router: hidden [..., H] -> (logits [T, E], weights [T, K], ids [T, K]).

    It stays an instance of the router's class, so ``output_router_logits=True`` and what trains with it work.
    """

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: Any = None
    ) -> list[str]:
        weight = getattr(orig_module, "weight", None)
        routes = isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(orig_module, "top_k")
        if routes and not isinstance(orig_module, nn.Linear):
            return []
        found = type(orig_module).__name__
        return [f"{cls.__name__} replaces a router (weight [E, H] and top_k), found {found}"]
