"""Decoder layers: norm, attention, sum, norm, MLP, sum in one native call where all parts compute natively on the CPU.

That a family's layer is these six steps is recognized by its results, as routing.py recognizes routers: its own code
runs on a twin whose parts are stand-ins. A layer of another kind, or one of whose parts is observed, trained, or
elsewhere, stays the family's own, and its parts are whatever operators they are.
Letters: B batch, S tokens, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers import native
from ktransformers.models.traits import TRAITS
from ktransformers.native import torch_ops
from ktransformers.operators.attending import epsilon, normed
from ktransformers.operators.base_operator import FamilyOperator, version
from ktransformers.operators.combining import is_observed
from ktransformers.operators.experts_in_c import mlp_in_c
from ktransformers.operators.moe import ComputedInC
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedLayer
from ktransformers.operators.routing import may_use_c
from ktransformers.operators.twin import close, noise, original, remembered, tensors_of, twin


@dataclass(frozen=True)
class Stacking:
    """y = x + factor * attention(norm(x)); out = y + factor * mlp(norm(y)): names of the children, in that order."""

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str
    factor: float
    norm_plus_one: bool
    eps: tuple[float, float]

    @property
    def children(self) -> list[str]:
        return [self.attention_norm, self.attention, self.mlp_norm, self.mlp]


@remembered
def stacking_of(layer: nn.Module) -> Stacking | None:
    """How `layer` is put together, or None where it is otherwise."""
    return _recognize(layer)


class _Gives(nn.Module):
    """In the place of attention or MLP: a fixed function of what it is given."""

    def __init__(self, scale: float, pair: bool) -> None:
        super().__init__()
        self.scale, self.pair, self.calls = scale, pair, 0

    def apply(self, x: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, -1) * self.scale)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return (self.apply(hidden_states), None) if self.pair else self.apply(hidden_states)


def _recognize(layer: nn.Module) -> Stacking | None:
    children = {name: child for name, child in layer._modules.items() if child is not None}
    attention = [n for n, c in children.items() if TRAITS["attention"](original(c))]
    norms = [n for n, c in children.items() if TRAITS["norm"](original(c)) and tensors_of(c).keys() == {"weight"}]
    rest = [n for n in children if n not in (*attention, *norms)]
    if len(attention) != 1 or len(norms) != 2 or len(rest) != 1 or layer._parameters or layer._buffers:
        return None
    width = original(children[norms[0]]).weight.shape[-1]
    x = noise(1, 5, width, seed=3)
    for pair in (False, True):  # gpt-oss's block gives its router's weights, too
        mixes, mlp = _Gives(1.5, True), _Gives(0.7, pair)
        made = twin(layer, torch.float32, {attention[0]: mixes, rest[0]: mlp})
        try:
            out = made(x, attention_mask=None, position_embeddings=None)
            break
        except (TypeError, ValueError):
            if pair:
                return None
    if not isinstance(out, Tensor) or out.shape != x.shape or mixes.calls != 1 or mlp.calls != 1:
        return None
    factors = {1.0, float(getattr(layer, "residual_multiplier", 1.0))}
    for first, second in (norms, norms[::-1]):
        for plus_one in (False, True):
            for factor in factors:
                eps = epsilon(made._modules[first]), epsilon(made._modules[second])
                weights = [made._modules[name].weight + (1.0 if plus_one else 0.0) for name in (first, second)]
                y = x + factor * mixes.apply(normed(x, weights[0], eps[0]))
                y = y + factor * mlp.apply(normed(y, weights[1], eps[1]))
                if close(out, y):
                    return Stacking(first, attention[0], second, rest[0], factor, plus_one, eps)
    return None


class KDecoderLayer(FamilyOperator):
    """hidden [B, S, H] -> [B, S, H]."""

    replaces = "a decoder layer (attention and an MLP among its children)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stacking: Stacking | None = None
        self._mlp: tuple[Any, native.Experts | None] = (None, None)
        self._layer: tuple[tuple, native.Layers] | None = None
        self._norms: list[int] = []

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["layer"](module)

    def load(self) -> None:
        super().load()
        played = is_in_torch_dispatch_mode()  # a simulation: there are no weights to compute with
        self.stacking = stacking_of(self.orig_module) if native.available() and not played else None
        self._norms = self._own_norms()

    def unload(self) -> None:
        super().unload()
        self.stacking, self._layer, self._mlp = None, None, (None, None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = None if args else self.native_step(hidden_states, kwargs)
        if found is None:
            return super().forward(hidden_states, *args, **kwargs)
        layer, held = found
        positions, mask, first, factor = self.attention.step(held, hidden_states, kwargs)
        out = layer.forward(hidden_states, [held.pages], [positions], mask, first, q_factors=[factor])
        held.advanced()
        return out

    def _own_norms(self) -> list[int]:
        names = [] if self.stacking is None else [self.stacking.attention_norm, self.stacking.mlp_norm]
        return [id(self._modules[name]) for name in names]

    @property
    def attention(self) -> nn.Module:
        """The attention among its children."""
        return self._modules[self.stacking.attention]

    def native_step(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[native.Layers, PagedLayer] | None:
        """The layer in C and its part of the cache, or None where its parts must compute one by one."""
        if self.stacking is None or not may_use_c(self, hidden) or torch_ops.is_traced(hidden):
            return None
        children = self._modules
        attention, mlp = self.attention, children[self.stacking.mlp]
        if self._own_norms() != self._norms:  # others since: nobody knows what they compute
            return None
        if not isinstance(attention, PagedAttention) or is_observed(self, self.stacking.children):
            return None
        if attention.attending is not None and attention.attending.narrow:  # an index sees what the first norm gives
            return None
        pages = attention.pages(hidden, kwargs)
        second = self._second(mlp, hidden.dtype) if pages is not None else None
        if second is None:
            return None
        norms = [children[name].weight for name in (self.stacking.attention_norm, self.stacking.mlp_norm)]
        key = (attention.native, second, *((norm.data_ptr(), version(norm)) for norm in norms))
        if self._layer is None or self._layer[0] != key:
            shift = 1.0 if self.stacking.norm_plus_one else 0.0
            made = native.Layer(
                attention.native, second, [norm.detach().float() + shift for norm in norms], self.stacking.eps,
                self.stacking.factor, self.key,
            )  # fmt: skip
            self._layer = key, native.Layers([made])
        return self._layer[1], pages

    def _second(self, mlp: nn.Module, dtype: torch.dtype) -> native.Block | native.Experts | None:
        if isinstance(mlp, ComputedInC):
            return mlp.in_c(dtype)
        if self._mlp[0] is not mlp:
            self._mlp = mlp, mlp_in_c(mlp)
        return self._mlp[1]

    def extra_repr(self) -> str:
        return "one native call" if self._layer is not None else ""
